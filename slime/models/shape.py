"""The sizes and settings of a model, read from HuggingFace's config.json; no number is guessed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that is not built; the message says what."""


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of low rotary frequencies (transformers' rope_type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class RotaryShape:
    """Rotary position embedding.

    Attributes:
        dim: rotated dimensions of a head.
        base: theta.
        factor: positions are divided by it (rope_type `linear`).
        llama3: set for rope_type `llama3`.
    """

    dim: int
    base: float
    factor: float = 1.0
    llama3: Llama3Scaling | None = None

    def inverse_frequencies(self) -> Tensor:
        """[dim/2] float32, radians per position."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        frequencies = 1.0 / (self.base**exponents) / self.factor
        if self.llama3 is None:
            return frequencies
        scaling = self.llama3
        wave_lengths = 2 * math.pi / frequencies
        low = scaling.original_max_position / scaling.low_freq_factor
        high = scaling.original_max_position / scaling.high_freq_factor
        smooth = (scaling.original_max_position / wave_lengths - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        slow = frequencies / scaling.factor
        between = (1 - smooth) * slow + smooth * frequencies
        return torch.where(wave_lengths > low, slow, torch.where(wave_lengths < high, frequencies, between))


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, SwiGLU and grouped-query attention."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rotary: RotaryShape
    is_tied: bool
    has_qkv_bias: bool = False
    has_qk_norm: bool = False


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a HuggingFace folder."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no config.json: give the folder of a HuggingFace checkpoint.")
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def dense_shape(config: Mapping[str, Any], *, has_qkv_bias: bool = False, has_qk_norm: bool = False) -> ModelShape:
    """The shape from the setting names that llama and its descendants share.

    Raises:
        UnsupportedModelError: a setting that would change the numbers and is not built.
    """
    _refuse(
        config, "hidden_act", lambda value: value not in ("silu", None), "only the SwiGLU activation (silu) is built"
    )
    _refuse(config, "mlp_bias", bool, "biases in the MLP are not built")
    _refuse(config, "quantization_config", bool, "a quantized checkpoint must be converted to bf16 or fp32 first")
    _refuse(config, "use_sliding_window", bool, "sliding-window attention is not built")
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    return ModelShape(
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_hidden_size=int(config["intermediate_size"]),
        num_attention_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rotary=rotary_shape(config, head_dim),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=has_qkv_bias,
        has_qk_norm=has_qk_norm,
    )


def rotary_shape(config: Mapping[str, Any], head_dim: int) -> RotaryShape:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    dim = int(head_dim * float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RotaryShape(dim, float(base))
    if kind == "linear":
        return RotaryShape(dim, float(base), factor=float(parameters["factor"]))
    if kind == "llama3":
        scaling = Llama3Scaling(
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
        return RotaryShape(dim, float(base), llama3=scaling)
    raise UnsupportedModelError(
        f"config.json asks for rotary scaling of the type {kind!r}; built are default, linear and llama3. "
        "For contexts up to the length the model was trained with, remove the scaling from config.json."
    )


def _refuse(config: Mapping[str, Any], name: str, is_refused: Any, reason: str) -> None:
    value = config.get(name)
    if is_refused(value):
        raise UnsupportedModelError(f"config.json has {name} = {value!r}: {reason}.")
