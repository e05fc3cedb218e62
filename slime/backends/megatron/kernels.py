"""What the layers and the head compute with on this device: chosen once, as one object with a name for the log.

Letters: T rows of a packed micro-batch, N response tokens.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slime.backends.megatron import head, pointwise
from slime.backends.megatron.gpu_attention import ATTENTIONS, Attention, attention_named

POINTWISE_NAMES = ("Triton", "torch")
"""Who computes norms, rotation, SwiGLU and the head's softmax on a GPU, the preferred one first."""
ATTENTION_NAMES = tuple(ATTENTIONS)
"""Kernels of `gpu_attention`, the preferred one first."""

_BY_FLAG = {"auto": ATTENTION_NAMES[0], "fused": ATTENTION_NAMES[0], "flash": "flash attention"}
"""--attention-backend -> one of `ATTENTION_NAMES`."""


@dataclass(frozen=True)
class Kernels:
    """The functions of one device.

    Attributes:
        name: what they are, for the log.
        rms_norm: (x, weight, eps), see `pointwise`.
        rotate: (x, cos, sin), see `pointwise`.
        swiglu: (x), see `pointwise`.
        take_rows: (x, index, starts, places), see `triton_kernels`.
        log_probs: as `head.response_log_probs`.
        attention: variable-length attention on a GPU; None on a CPU, where `cpu_attention` does it in blocks.
        angles_in_float32: whether `rotate` takes cosines in float32, as SGLang does on a GPU; else they are rounded to
            the dtype of the activations, as transformers does.
    """

    name: str
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    take_rows: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    log_probs: Callable[..., tuple[Tensor, Tensor | None]]
    attention: Attention | None = None
    angles_in_float32: bool = False


_OF_TORCH = (
    pointwise.rms_norm, pointwise.rotate, pointwise.swiglu, pointwise.take_rows, head.response_log_probs
)  # fmt: skip

CPU = Kernels("attention in blocks; products by oneDNN", *_OF_TORCH)

_forced: dict[str, str] = {}


@contextmanager
def forced(*, pointwise: str | None = None, attention: str | None = None) -> Iterator[None]:
    """Models that are built meanwhile on a GPU take these, whatever is preferred: for benchmarks and tests."""
    before = dict(_forced)
    wanted: dict[str, Any] = {"pointwise": pointwise, "attention": attention}
    _forced.update({part: name for part, name in wanted.items() if name is not None})
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def kernels_for(device: torch.device, attention_backend: str = "auto") -> Kernels:
    """What models on this device compute with.

    Args:
        attention_backend: --attention-backend: `flash`, or `auto` and `fused`, which take cuDNN's for long sequences.
    """
    if device.type == "cpu":
        return CPU
    has_triton = importlib.util.find_spec("triton") is not None
    by = _forced.get("pointwise") or (POINTWISE_NAMES[0] if has_triton else POINTWISE_NAMES[1])
    name = _forced.get("attention") or _BY_FLAG[attention_backend]
    pieces = _of_triton() if by == "Triton" else _OF_TORCH
    words = f"attention by {name}; norms, rotation, SwiGLU and head by {by}"
    return Kernels(words, *pieces, attention_named(name), by == "Triton")


def _of_triton() -> tuple[Callable[..., Any], ...]:
    from slime.backends.megatron import gpu_head
    from slime.backends.megatron import triton_kernels as t

    return t.rms_norm, t.rotate, t.swiglu, t.take_rows, gpu_head.response_log_probs
