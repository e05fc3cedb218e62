"""Evaluation tasks from flags or a file; a value is looked for in the task, the defaults, the run's flags."""

from argparse import Namespace
from pathlib import Path

import pytest

from slime.config.errors import ConfigError
from slime.config.eval_datasets import EvalDatasetConfig, build_eval_dataset_configs, eval_datasets_of

ARGS = Namespace(
    eval_config=None, eval_prompt_data=None, n_samples_per_eval_prompt=2, n_samples_per_prompt=8, eval_temperature=None,
    rollout_temperature=0.7, input_key="input", label_key=None, rollout_stop=["\n"], custom_rm_path=None,
)  # fmt: skip


def args(**values: object) -> Namespace:
    return Namespace(**(vars(ARGS) | values))


def test_a_task_wins_over_defaults_and_defaults_over_flags() -> None:
    tasks = [{"name": "a", "path": "a.jsonl", "temperature": 0.0}, {"name": "b", "path": "b.jsonl"}]
    a, b = build_eval_dataset_configs(args(), tasks, {"temperature": 0.5, "input_key": "question"})
    assert (a.temperature, b.temperature) == (0.0, 0.5)
    assert (a.input_key, b.input_key) == ("question", "question")
    assert (a.n_samples_per_eval_prompt, a.stop) == (2, ["\n"])


def test_the_first_flag_that_says_something_counts() -> None:
    (task,) = build_eval_dataset_configs(args(), [{"name": "a", "path": "a"}])
    assert task.temperature == 0.7
    (task,) = build_eval_dataset_configs(args(eval_temperature=0.0), [{"name": "a", "path": "a"}])
    assert task.temperature == 0.0


def test_an_explicit_nothing_is_kept() -> None:
    (task,) = build_eval_dataset_configs(args(), [{"name": "a", "path": "a", "stop": None}])
    assert task.stop is None


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown keys in the eval defaults: \\['temprature'\\]"):
        build_eval_dataset_configs(args(), [], {"temprature": 0})
    with pytest.raises(TypeError, match="unknown key 'temprature'. Did you mean temperature"):
        build_eval_dataset_configs(args(), [{"name": "a", "path": "a", "temprature": 0}])


def test_a_file_may_list_its_tasks_or_name_them(tmp_path: Path) -> None:
    listed, named = tmp_path / "listed.yaml", tmp_path / "named.json"
    listed.write_text("eval:\n  defaults: {top_p: 0.9}\n  datasets:\n  - {name: aime, path: a.jsonl, rm_type: math}\n")
    named.write_text('{"datasets": {"aime": {"path": "a.jsonl", "rm_type": "math", "top_p": 0.9}}}')
    assert eval_datasets_of(args(eval_config=str(listed))) == eval_datasets_of(args(eval_config=str(named)))


def test_a_single_file_is_called_aime() -> None:
    assert [(d.name, d.path) for d in eval_datasets_of(args(eval_prompt_data=["x.jsonl"]))] == [("aime", "x.jsonl")]


def test_the_file_replaces_the_pairs(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("datasets: {gsm: {path: g.jsonl}}")
    assert [d.name for d in eval_datasets_of(args(eval_config=str(path), eval_prompt_data=["a", "b"]))] == ["gsm"]


def test_a_file_that_is_not_yaml_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text("eval: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        eval_datasets_of(args(eval_config=str(path)))


def test_metadata_is_laid_over_a_samples_own() -> None:
    task = EvalDatasetConfig("a", "a", rm_type="math", metadata_overrides={"level": 2})
    metadata = {"level": 1, "kept": True}
    assert task.inject_metadata(metadata) == {"level": 2, "kept": True, "rm_type": "math"}
    assert metadata == {"level": 1, "kept": True}


def test_a_task_is_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match="metadata_overrides"):
        EvalDatasetConfig("a", "a", metadata_overrides=["x"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_eval_samples"):
        EvalDatasetConfig("a", "a", min_eval_samples=0)


def test_tasks_with_the_same_rows_share_their_samples() -> None:
    a = EvalDatasetConfig("a", "p", input_key="q", temperature=0.0)
    assert a.cache_key == EvalDatasetConfig("a", "p", input_key="q", temperature=1.0).cache_key
    assert a.cache_key != EvalDatasetConfig("a", "p", input_key="r").cache_key
