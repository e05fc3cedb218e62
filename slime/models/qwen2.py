"""Qwen2 and Qwen2.5: llama with a bias on query, key and value."""

from collections.abc import Mapping
from typing import Any

from slime.models.llama import ATTENTION, MLP, OUTSIDE_LAYERS, QKV_BIAS
from slime.models.shape import ModelShape, dense_shape
from slime.models.table import Family


def _shape(config: Mapping[str, Any]) -> ModelShape:
    return dense_shape(config, has_qkv_bias=True)


FAMILY = Family("qwen2", (*OUTSIDE_LAYERS, *ATTENTION, QKV_BIAS, *MLP), _shape)
