"""config.json to the model's shape."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slime.models import family_of
from slime.models.shape import UnsupportedModelError, rotary_shape

LLAMA = dict(
    model_type="llama", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=100, max_position_embeddings=128, rms_norm_eps=1e-5,
)  # fmt: skip


def test_head_size_and_groups_follow_from_the_rest_where_they_are_not_given() -> None:
    shape = family_of(LLAMA).shape_of({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (shape.head_dim, shape.num_query_groups, shape.is_tied) == (16, 4, False)
    assert family_of(LLAMA).shape_of(LLAMA | {"head_dim": 24}).head_dim == 24


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    config = AutoConfig.for_model(**(LLAMA | {"rope_parameters": scaling}))
    if scaling["rope_type"] == "default":
        exponents = torch.arange(0, 16, 2).float() / 16
        expected = 1.0 / (scaling["rope_theta"] ** exponents)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    ours = rotary_shape({"rope_parameters": scaling}, head_dim=16).inverse_frequencies()
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=0)


def test_older_configs_say_theta_and_scaling_elsewhere() -> None:
    assert rotary_shape({"rope_theta": 7.0}, 8).base == 7.0
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert (rotary_shape(old, 8).base, rotary_shape(old, 8).factor) == (7.0, 2.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'; built are default, linear and llama3"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "converted to bf16"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_would_change_the_numbers_and_is_not_built_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        family_of(LLAMA).shape_of(LLAMA | change)


def test_families_differ_in_biases_and_norms() -> None:
    shapes = {name: family_of({"model_type": name}).shape_of(LLAMA) for name in ("llama", "qwen2", "qwen3")}
    assert [shapes[name].has_qkv_bias for name in shapes] == [False, True, False]
    assert [shapes[name].has_qk_norm for name in shapes] == [False, False, True]
