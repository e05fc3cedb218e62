"""The shapes of hooks that plug-in authors' own tests check by `inspect.signature`."""

import inspect
from dataclasses import fields

import pytest

from slime.rollout import data_source, sft_rollout, sglang_rollout, sglang_streaming_rollout, sleep_rollout
from slime.rollout.filter_hub import dynamic_sampling_filters
from slime.rollout.rm_hub import async_rm, batched_async_rm
from slime.utils.data import Dataset
from slime.utils.http_utils import post
from slime.utils.mask_utils import MultiTurnLossMaskGenerator
from slime.utils.misc import should_run_periodic_action
from slime.utils.types import Sample

REQUIRED = inspect.Parameter.empty


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def names(function):
    return [name for name, _ in parameters(function)]


def test_rollout_functions():
    required = [("args", REQUIRED), ("rollout_id", REQUIRED)]
    assert parameters(sglang_rollout.generate_rollout) == [*required, ("data_source", REQUIRED), ("evaluation", False)]
    assert parameters(sft_rollout.generate_rollout) == [*required, ("data_buffer", REQUIRED), ("evaluation", False)]
    assert names(sleep_rollout.sleep)[:2] == ["args", "rollout_id"]
    assert not inspect.iscoroutinefunction(sglang_rollout.generate_rollout)


@pytest.mark.parametrize("function", [sglang_rollout.generate, sglang_streaming_rollout.generate_streaming])
def test_generate_functions(function):
    assert names(function) == ["args", "sample", "sampling_params"]
    assert inspect.iscoroutinefunction(function)


def test_functions_that_custom_rollouts_call():
    one = [("args", REQUIRED), ("sample", REQUIRED), ("sampling_params", REQUIRED), ("evaluation", False)]
    assert parameters(sglang_rollout.generate_and_rm) == one
    assert names(sglang_rollout.generate_and_rm_group) == ["args", "group", "sampling_params", "evaluation"]
    assert names(sglang_rollout.abort) == ["args", "rollout_id"]
    assert names(sglang_rollout.eval_rollout) == ["args", "rollout_id"]
    assert names(sglang_rollout.eval_rollout_single_dataset) == ["args", "rollout_id", "dataset_cfg"]
    assert names(sglang_rollout.get_model_url)[:2] == ["args", "model_name"]
    assert dict(parameters(sglang_rollout.get_model_url))["endpoint"] == "/generate"
    for function in ("generate_and_rm", "generate_and_rm_group", "abort", "eval_rollout"):
        assert inspect.iscoroutinefunction(getattr(sglang_rollout, function))


@pytest.mark.parametrize("name", ["check_reward_nonzero_std", "check_reward_nonzero_std_with_fallback"])
def test_dynamic_filters(name):
    assert names(getattr(dynamic_sampling_filters, name))[:2] == ["args", "samples"]


def test_rewards():
    assert names(async_rm)[:2] == ["args", "sample"]
    assert names(batched_async_rm)[:2] == ["args", "samples"]


def test_data_sources():
    assert names(data_source.pop_first) == ["args", "rollout_id", "buffer", "num_samples"]
    for cls in (data_source.RolloutDataSource, data_source.RolloutDataSourceWithBuffer):
        assert parameters(cls.__init__) == [("self", REQUIRED), ("args", REQUIRED)]
        assert issubclass(cls, data_source.DataSource)
        assert parameters(cls.load) == [("self", REQUIRED), ("rollout_id", None)]
        assert names(cls.get_samples) == ["self", "num_samples"]
    assert data_source.DataSource.__abstractmethods__ == {"get_samples", "add_samples", "save", "load", "__len__"}


def test_helpers_take_the_arguments_that_plugins_pass():
    assert parameters(post)[:4] == [("url", REQUIRED), ("payload", REQUIRED), ("max_retries", 60), ("headers", None)]
    assert parameters(Dataset.__init__)[1:5] == [
        (name, REQUIRED) for name in ("path", "tokenizer", "processor", "max_length")
    ]
    assert dict(parameters(Dataset.__init__)[5:]) == {
        "prompt_key": "text",
        "multimodal_keys": None,
        "label_key": None,
        "tool_key": None,
        "metadata_key": "metadata",
        "seed": 42,
        "apply_chat_template": False,
        "apply_chat_template_kwargs": None,
    }
    assert parameters(MultiTurnLossMaskGenerator)[1] == ("tokenizer_type", "qwen")
    assert names(should_run_periodic_action) == ["rollout_id", "interval", "num_rollout_per_epoch", "num_rollout"]


def test_a_sample_has_the_documented_fields_in_order():
    assert " ".join(field.name for field in fields(Sample)) == (
        "group_index index rollout_id prompt tokens multimodal_inputs multimodal_train_inputs "
        "multimodal_train_input_id apply_chat_template_kwargs response response_length label reward loss_mask "
        "weight_versions rollout_log_probs rollout_top_p_token_ids rollout_top_p_token_offsets "
        "rollout_routed_experts remove_sample teacher_log_probs status metadata generate_function_path "
        "custom_rm_path train_metadata session_id non_generation_time spec_info prefix_cache_info"
    )
    assert {status.name: status.value for status in Sample.Status} == {
        "PENDING": "pending",
        "COMPLETED": "completed",
        "TRUNCATED": "truncated",
        "ABORTED": "aborted",
        "FAILED": "failed",
    }
    assert names(Sample.append_response_tokens) == [
        "self",
        "args",
        "tokens",
        "log_probs",
        "trainable",
        "meta_info",
        "text",
        "update_terminal_info",
    ]
