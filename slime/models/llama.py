"""Llama 2 and 3, SmolLM2 and others that say `llama`: the table that its descendants extend."""

from collections.abc import Mapping
from typing import Any

from slime.models.shape import ModelShape, UnsupportedModelError, dense_shape
from slime.models.table import EMBEDDING, OUTPUT_LAYER, Entry, Family, QueryKeyValue, Same, Stacked, Vocabulary

_MEGATRON, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")

OUTSIDE_LAYERS = (
    Entry(EMBEDDING, ("model.embed_tokens.weight",), Vocabulary()),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Same()),
    Entry(OUTPUT_LAYER, ("lm_head.weight",), Vocabulary()),
)
ATTENTION = (
    Entry(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Same()),
    Entry(
        _MEGATRON + "self_attention.linear_qkv.weight",
        tuple(f"{_HF}self_attn.{name}.weight" for name in _PROJECTIONS),
        QueryKeyValue(),
    ),
    Entry(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Same(dim=1)),
)
MLP = (
    Entry(_MEGATRON + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Same()),
    Entry(_MEGATRON + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), Stacked()),
    Entry(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Same(dim=1)),
)
QKV_BIAS = Entry(
    _MEGATRON + "self_attention.linear_qkv.bias",
    tuple(f"{_HF}self_attn.{name}.bias" for name in _PROJECTIONS),
    QueryKeyValue(),
)
QK_NORM = (
    Entry(_MEGATRON + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), Same()),
    Entry(_MEGATRON + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), Same()),
)


def _shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_attention_bias(config)
    return dense_shape(config)


def refuse_attention_bias(config: Mapping[str, Any]) -> None:
    """`attention_bias` of llama and qwen3 puts a bias on the output projection too, which Megatron's spec lacks."""
    if config.get("attention_bias"):
        raise UnsupportedModelError(
            f"config.json of the {config.get('model_type')} model has attention_bias = true: "
            "a bias on the attention's output projection is not built."
        )


FAMILY = Family("llama", OUTSIDE_LAYERS + ATTENTION + MLP, _shape)
