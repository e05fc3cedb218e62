"""Qwen3 (dense): llama with a norm on each query and key head."""

from collections.abc import Mapping
from typing import Any

from slime.models.llama import ATTENTION, MLP, OUTSIDE_LAYERS, QK_NORM, refuse_attention_bias
from slime.models.shape import ModelShape, dense_shape
from slime.models.table import Family


def _shape(config: Mapping[str, Any]) -> ModelShape:
    refuse_attention_bias(config)
    return dense_shape(config, has_qk_norm=True)


FAMILY = Family("qwen3", (*OUTSIDE_LAYERS, *ATTENTION, *QK_NORM, *MLP), _shape)
