"""Evaluation tasks: where each value comes from, and what is refused."""

from argparse import Namespace

import pytest

from slime.utils.eval_config import EvalDatasetConfig, build_eval_dataset_configs, ensure_dataset_list

ARGS = Namespace(
    n_samples_per_eval_prompt=None,
    n_samples_per_prompt=8,
    eval_temperature=None,
    rollout_temperature=0.9,
    eval_input_key=None,
    input_key="prompt",
    eval_custom_rm_path=None,
    custom_rm_path="mine.rm",
)


def test_a_value_comes_from_the_task_then_the_defaults_then_the_flags():
    first, second = build_eval_dataset_configs(
        ARGS,
        [{"name": "a", "path": "a.jsonl", "temperature": 0.1}, {"name": "b", "path": "b.jsonl", "input_key": None}],
        {"temperature": 0.5, "n_samples_per_eval_prompt": 4, "rm_type": "math"},
    )
    assert (first.temperature, second.temperature) == (0.1, 0.5)
    assert (first.n_samples_per_eval_prompt, first.rm_type) == (4, "math")
    assert (first.input_key, second.input_key) == ("prompt", None)
    assert first.custom_rm_path == "mine.rm"
    assert first.label_key is None
    (plain,) = build_eval_dataset_configs(ARGS, [{"name": "a", "path": "a.jsonl"}])
    assert (plain.temperature, plain.n_samples_per_eval_prompt) == (0.9, 8)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="unknown keys: temprature"):
        build_eval_dataset_configs(ARGS, [], {"temprature": 1})
    with pytest.raises(ValueError, match="unknown keys: path"):
        build_eval_dataset_configs(ARGS, [], {"path": "x"})
    with pytest.raises(TypeError, match="temprature"):
        build_eval_dataset_configs(ARGS, [{"name": "a", "path": "p", "temprature": 1}])


def test_tasks_are_a_list_or_a_mapping_of_names():
    assert ensure_dataset_list({"a": {"path": "x"}}) == [{"name": "a", "path": "x"}]
    assert ensure_dataset_list([{"name": "a", "path": "x"}]) == [{"name": "a", "path": "x"}]
    assert ensure_dataset_list(None) == []
    with pytest.raises(ValueError, match="no path"):
        ensure_dataset_list({"a": None})
    for wrong in ("aime", 3, ["aime"]):
        with pytest.raises(ValueError, match="must be a"):
            ensure_dataset_list(wrong)


def test_metadata_is_added_to_a_copy():
    config = EvalDatasetConfig("a", "p", rm_type="math", metadata_overrides={"level": 3})
    own = {"level": 1, "x": 2}
    assert config.inject_metadata(own) == {"level": 3, "x": 2, "rm_type": "math"}
    assert own == {"level": 1, "x": 2}
    assert EvalDatasetConfig("a", "p").inject_metadata(None) == {}


def test_values_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="metadata_overrides"):
        EvalDatasetConfig("a", "p", metadata_overrides=[1])
    with pytest.raises(ValueError, match="min_eval_samples"):
        EvalDatasetConfig("a", "p", min_eval_samples=0)


def test_tasks_that_read_the_same_samples_have_the_same_key():
    one = EvalDatasetConfig("a", "p", temperature=1.0)
    assert one.cache_key == EvalDatasetConfig("a", "p", temperature=0.0).cache_key
    assert one.cache_key != EvalDatasetConfig("a", "p", label_key="x").cache_key
