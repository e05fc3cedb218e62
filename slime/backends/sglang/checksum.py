"""The digests that an SGLang server reports for its loaded weights, computed from HuggingFace tensors.

`POST /weights_checker {"action": "checksum"}` (SGLang 0.5.16 to 0.5.23) answers with one 64-bit digest per parameter
and tensor-parallel rank, taken of the memory that computes. SGLang fuses some HuggingFace tensors, pads the
vocabulary and shards over ranks; this module does the same to the trainer's tensors, bucket by bucket.

Letters: w words of 32 bits in a tensor, r tensor-parallel rank.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Algorithm = Literal["sha256", "fmix64"]

_VOCAB_PADDING = 64  # SGLang pads the rows of the embedding and of the head to a multiple of this, with zeros
_VOCAB_PARALLEL = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")
_ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj)\.weight$")
_FUSED_PART = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.(weight|bias)$")
_FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_NAME_OF_PART = {part: fused for fused, parts in _FUSED.items() for part in parts}

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Families whose SGLang implementation fuses and names exactly as this module does."""


@dataclass(frozen=True)
class TensorParallel:
    """How an engine shards a model over its ranks."""

    size: int = 1
    num_key_value_heads: int | None = None
    """Of the whole model; needed when size > 1, because ranks beyond it hold copies of the same head."""


def algorithm_of(device: str) -> Algorithm:
    """Which digest a server on `device` ("cpu" or "cuda") takes."""
    return "fmix64" if device == "cuda" else "sha256"


def expected_checksums(
    named_hf_tensors: Iterable[tuple[str, Tensor]],
    model_type: str,
    tp_size: int = 1,
    *,
    num_key_value_heads: int | None = None,
    algorithm: Algorithm = "sha256",
) -> dict[str, str]:
    """Digests that a server holding exactly these tensors reports; see `FusedTensorDigests`."""
    parallel = TensorParallel(tp_size, num_key_value_heads)
    digests = FusedTensorDigests(model_type, parallel, algorithm=algorithm)
    digests.add(named_hf_tensors)
    return digests.result()


class FusedTensorDigests:
    """Expected digests of an SGLang engine, from buckets of HuggingFace tensors in any order.

    Holds a tensor only while the other parts of its fused tensor are still to come. Keys are SGLang's parameter
    names, with `tp{r}:` before them when there is more than one rank, as `SGLangClient.checksums` gives them.
    Tensors must have the dtype in which the engine serves.
    """

    def __init__(self, model_type: str, parallel: TensorParallel | None = None, *, algorithm: Algorithm = "sha256"):
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(
                f"SGLang's weight digests of model type {model_type!r} cannot be foretold: the way it fuses tensors is "
                f"known here for {', '.join(SUPPORTED_MODEL_TYPES)}. Use --rollout-engine embedded for this model."
            )
        self._parallel = parallel or TensorParallel()
        if self._parallel.size > 1 and self._parallel.num_key_value_heads is None:
            raise ValueError(f"With {self._parallel.size} tensor-parallel ranks num_key_value_heads must be given.")
        self._algorithm: Algorithm = algorithm
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._digests: dict[str, _Pending] = {}

    def add(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take note of (HuggingFace name, whole tensor) pairs."""
        for name, tensor in named_tensors:
            match = _FUSED_PART.search(name)
            if match is None:
                self._finish(name, [self._shards(name, tensor)])
                continue
            part, kind = match.groups()
            fused = _FUSED_NAME_OF_PART[part]
            fused_name = f"{name[: match.start()]}.{fused}.{kind}"
            parts = self._waiting.setdefault(fused_name, {})
            parts[part] = tensor
            if len(parts) == len(_FUSED[fused]):
                del self._waiting[fused_name]
                self._finish(fused_name, [self._shards(p, parts[p]) for p in _FUSED[fused]])

    def result(self) -> dict[str, str]:
        """SGLang's parameter name -> 16 hex digits.

        Raises:
            ValueError: a fused tensor never got all its parts.
        """
        if self._waiting:
            fused_name, parts = next(iter(self._waiting.items()))
            missing = [part for part in _FUSED[fused_name.split(".")[-2]] if part not in parts]
            raise ValueError(
                f"{len(self._waiting)} fused tensor(s) lack a part: {fused_name} has {', '.join(parts)} "
                f"but {', '.join(missing)} never came. A bucket was dropped on its way to the digests."
            )
        return {key: pending() for key, pending in self._digests.items()}

    def _finish(self, name: str, parts: list[list[Tensor]]) -> None:
        """Digest, for each rank, the concatenated rows of `parts` (one list of shards a part)."""
        for rank in range(self._parallel.size):
            key = name if self._parallel.size == 1 else f"tp{rank}:{name}"
            self._digests[key] = begin_digest([shards[rank] for shards in parts], self._algorithm)

    def _shards(self, name: str, tensor: Tensor) -> list[Tensor]:
        """What each rank holds of a HuggingFace tensor (`name` may be a bare part such as k_proj)."""
        size = self._parallel.size
        if _VOCAB_PARALLEL.search(name):
            return list(pad_vocabulary(tensor, size).chunk(size))
        if size == 1:
            return [tensor]
        if name in ("k_proj", "v_proj"):
            assert self._parallel.num_key_value_heads is not None
            return _head_shards(tensor, self._parallel.num_key_value_heads, size)
        if name in _FUSED_NAME_OF_PART:
            return list(tensor.chunk(size))
        if _ROW_PARALLEL.search(name):
            return list(tensor.chunk(size, dim=1))
        return [tensor] * size


def _head_shards(tensor: Tensor, num_heads: int, size: int) -> list[Tensor]:
    """Rows of whole heads a rank; with more ranks than heads, neighbouring ranks hold the same head."""
    if num_heads >= size:
        return list(tensor.chunk(size))
    heads = tensor.chunk(num_heads)
    return [heads[rank * num_heads // size] for rank in range(size)]


def pad_vocabulary(tensor: Tensor, tp_size: int = 1) -> Tensor:
    """Add zero rows up to a multiple of 64, or of 64 * tp_size where 64 does not share out over the ranks."""
    padding = _VOCAB_PADDING
    if -(-tensor.shape[0] // padding) * padding % tp_size != 0:
        padding *= tp_size
    num_missing = -tensor.shape[0] % padding
    return F.pad(tensor, (0, 0, 0, num_missing)) if num_missing else tensor


_Pending = Callable[[], str]
"""Gives a digest, once the device has computed it."""


def begin_digest(parts: list[Tensor], algorithm: Algorithm) -> _Pending:
    """16 hex digits over the bytes of `parts`, one after another in row-major order. On a GPU it does not wait."""
    if algorithm == "sha256":
        hasher = hashlib.sha256()
        for part in parts:
            hasher.update(_bytes(part).cpu().numpy().data)
        text = hasher.hexdigest()[:16]
        return lambda: text
    pieces = [_bytes(part) for part in parts]
    total = begin_fmix64(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    return lambda: f"{finish_fmix64(total):016x}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


_TILE = 8192  # words whose hashes are added modulo 2^32 before the first mix
_STEP_TILES = 512  # bounds the 64-bit temporaries
_LOW32 = 0xFFFFFFFF
_LOW64 = 0xFFFFFFFFFFFFFFFF
_SEED = 0x243F6A88
_LANES = (  # (position multiplier, seed, rotation)
    (0x27D4EB2D, _SEED, 15),
    (0x165667B1, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _LOW32, 13),
)


def fmix64(data: Tensor) -> int:
    """The position-dependent 64-bit hash that a CUDA server takes of [n] uint8; runs on the tensor's device."""
    return finish_fmix64(begin_fmix64(data))


def begin_fmix64(data: Tensor) -> Tensor:
    """Start `fmix64`; the result, still to be mixed, is [1] int64 on the data's device, or empty for no data."""
    if data.numel() % 4 or data.storage_offset() % 4:  # words are read where they lie
        data = F.pad(data, (0, -data.numel() % 4))
    if data.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if data.is_cuda:
        from slime.backends.sglang.fmix64_kernel import add_hash

        total = torch.zeros(1, dtype=torch.int64, device=data.device)
        add_hash(data.view(torch.int32), total, (_LANES[0][1], _LANES[1][1]))
        return total
    value = _sum_of_tiles(data)
    return torch.tensor([value - (1 << 64) if value >> 63 else value])


def finish_fmix64(total: Tensor) -> int:
    """The hash that `begin_fmix64` began."""
    return _splitmix64(int(total) & _LOW64) if total.numel() else 0


def _sum_of_tiles(data: Tensor) -> int:
    num_words = data.numel() // 4
    total = 0
    step = _TILE * _STEP_TILES
    for start in range(0, num_words, step):
        words = data[start * 4 : (start + step) * 4].view(torch.int32).to(torch.int64) & _LOW32
        index = torch.arange(start, start + words.numel(), device=data.device)
        halves = []
        for multiplier, seed, rotation in _LANES:
            rotated = ((index << rotation) | (index >> (32 - rotation))) & _LOW32
            position = ((index * multiplier + seed) & _LOW32) ^ rotated
            hashed = F.pad(_fmix32(words ^ position), (0, -words.numel() % _TILE))
            tiles = hashed.reshape(-1, _TILE).sum(1) & _LOW32
            halves.append(_fmix32(tiles ^ (num_words * 4 & _LOW32)))
        # Summing the halves apart keeps every number below 2^63.
        total += (int(halves[0].sum()) << 32) + int(halves[1].sum())
    return total & _LOW64


def _fmix32(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 numbers below 2^32 (products wrap modulo 2^64, which is harmless)."""
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * multiplier & _LOW32
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    """SplitMix64's finaliser."""
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * multiplier & _LOW64
    return x ^ (x >> 31)
