"""A model's shape comes from its config.json, and flags that say something else are refused."""

import pytest

from slime.config.errors import ConfigError
from slime.config.model_shape import compare_with_config, count_parameters, rope_theta_of, shape_of
from tests.unit.arguments.wrong_command_lines import TINY_QWEN3

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def test_a_real_model_has_its_published_size() -> None:
    """SmolLM2-135M: 134,515,008 parameters."""
    assert count_parameters(shape_of(SMOLLM2)) == 134_515_008


def test_a_head_has_its_own_width_or_its_share() -> None:
    assert shape_of(SMOLLM2)["kv_channels"] == 64
    assert shape_of(SMOLLM2 | {"head_dim": 128})["kv_channels"] == 128


def test_families_differ_in_bias_and_norm() -> None:
    qwen2 = shape_of(SMOLLM2 | {"architectures": ["Qwen2ForCausalLM"]})
    qwen3 = shape_of(TINY_QWEN3)
    assert (qwen2.get("add_qkv_bias"), qwen2.get("qk_layernorm")) == (True, None)
    assert (qwen3.get("add_qkv_bias"), qwen3.get("qk_layernorm")) == (None, True)


def test_the_newer_place_of_the_rotary_base_comes_first() -> None:
    assert rope_theta_of({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}) == 1e6
    assert rope_theta_of({}) == 1e4


def test_llama_3_scaling_is_passed_on() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0}
    shape = shape_of(SMOLLM2 | {"rope_scaling": scaling})
    assert (shape["use_rope_scaling"], shape["rope_scaling_factor"]) == (True, 8.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "It can train LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"num_hidden_layers": None}, "must be a whole number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_cannot_be_trained_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(SMOLLM2 | change)


OFF = {"add_qkv_bias": False, "qk_layernorm": False, "use_rope_scaling": False}


def test_everything_that_differs_is_in_one_message() -> None:
    values = shape_of(SMOLLM2) | {"num_layers": 28, "hidden_size": 1024, **OFF}
    with pytest.raises(ConfigError) as error:
        compare_with_config(values, frozenset({"num_layers", "hidden_size"}), SMOLLM2)
    assert "--num-layers is 28, but config.json says 30" in str(error.value)
    assert "--hidden-size is 1024, but config.json says 576" in str(error.value)


def test_an_absent_switch_counts_as_off_in_a_whole_description() -> None:
    untied = SMOLLM2 | {"tie_word_embeddings": False}
    values = shape_of(SMOLLM2) | {**OFF}
    compare_with_config(values, frozenset({"hidden_size"}), untied)
    with pytest.raises(ConfigError, match="--untie-embeddings-and-output-weights"):
        compare_with_config(values, frozenset({"num_layers"}), untied)


def test_numbers_are_compared_as_numbers() -> None:
    values = shape_of(SMOLLM2) | {"rotary_base": 100000, **OFF}
    compare_with_config(values, frozenset({"rotary_base", "norm_epsilon"}), SMOLLM2)


def test_positions_are_scaled_as_config_json_says() -> None:
    scaled = SMOLLM2 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    values = shape_of(scaled) | OFF | {"use_rope_scaling": True, "rotary_scaling_factor": 8.0}
    compare_with_config(values, frozenset({"use_rope_scaling", "rotary_scaling_factor"}), scaled)
    with pytest.raises(ConfigError, match="--use-rope-scaling is True, but config.json says False.*--rotary-scaling"):
        compare_with_config(values, frozenset({"use_rope_scaling", "rotary_scaling_factor"}), SMOLLM2)
