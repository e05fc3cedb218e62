"""A run's record: valid JSON whatever happens, TensorBoard without a flag, a line that people can read."""

import importlib.util
import io
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.observability.run_log import RunLog, read_metrics
from slime.observability.step_line import eval_scores, format_step
from slime.observability.tensorboard_utils import _TensorboardAdapter, read_scalars, tensorboard_dir
from slime.observability.wandb_utils import RUN_ID_FILE, WandbAdapter

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_tensorboard_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {constant}, which JSON does not have")

    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_each_step_is_one_line_that_is_there_before_step_returns(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", Namespace(no_tensorboard=True), stream=io.StringIO())
    log.step(0, {"train/loss": 0.5, "rollout/num_samples": 64})
    log.step(1, {"train/loss": torch.tensor(0.25), "rollout/raw_reward": 1})
    first, second = lines_of(tmp_path / "run")
    assert (first["step"], first["train/loss"], first["rollout/num_samples"]) == (0, 0.5, 64)
    assert (second["step"], second["train/loss"], second["rollout/raw_reward"]) == (1, 0.25, 1)
    log.close()


def test_a_number_that_is_not_finite_becomes_null_and_is_named(tmp_path: Path, caplog: Any) -> None:
    log = RunLog(tmp_path, Namespace(no_tensorboard=True), stream=io.StringIO())
    log.step(7, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/kl_loss": 0.0})
    (line,) = lines_of(tmp_path)
    assert line["train/loss"] is None and line["train/grad_norm"] is None and line["train/kl_loss"] == 0.0
    assert "Step 7: train/loss is nan" in caplog.text and "train/grad_norm is inf" in caplog.text
    log.close()


@pytest.mark.parametrize("value", ["0.5", [1.0], None, torch.zeros(2), torch.zeros(0)])
def test_a_value_that_is_not_one_number_is_an_error_that_names_the_metric(tmp_path: Path, value: Any) -> None:
    log = RunLog(tmp_path, Namespace(no_tensorboard=True), stream=io.StringIO())
    with pytest.raises(TypeError, match="train/loss"):
        log.step(0, {"train/loss": value})
    assert lines_of(tmp_path) == []
    log.close()


def test_an_undeclared_name_is_warned_about_once_and_still_written(tmp_path: Path, caplog: Any) -> None:
    log = RunLog(tmp_path, Namespace(no_tensorboard=True), stream=io.StringIO())
    log.step(0, {"mine/number": 1})
    log.step(1, {"mine/number": 2})
    assert [line["mine/number"] for line in lines_of(tmp_path)] == [1, 2]
    assert caplog.text.count("mine/number") == 1
    log.close()


def test_an_undeclared_name_is_an_error_in_the_projects_own_tests(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Namespace(no_tensorboard=True, ci_test=True), stream=io.StringIO())
    with pytest.raises(ValueError, match="mine/number"):
        log.step(0, {"mine/number": 1})
    log.close()


def test_a_resumed_run_continues_the_file_and_the_last_word_counts(tmp_path: Path, caplog: Any) -> None:
    args = Namespace(no_tensorboard=True)
    log = RunLog(tmp_path, args, stream=io.StringIO())
    for step in range(3):
        log.step(step, {"train/loss": float(step), "eval/gsm8k": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')  # the process died here
    log = RunLog(tmp_path, args, stream=io.StringIO())
    log.step(2, {"train/loss": 20.0})
    log.close()
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert read_metrics(tmp_path)[2]["eval/gsm8k"] == 0.5
    assert "metrics.jsonl:4 is not a whole line" in caplog.text


def test_reading_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is not there"):
        read_metrics(tmp_path)


def test_tensorboard_gets_every_scalar_in_the_runs_folder_without_a_flag(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Namespace(use_tensorboard=False), stream=io.StringIO())
    log.step(-1, {"eval/gsm8k": 0.25})
    log.step(0, {"eval/gsm8k": 0.5, "train/loss": 2.0})
    log.close()
    assert read_scalars(tmp_path) == {"eval/gsm8k": [(-1, 0.25), (0, 0.5)], "train/loss": [(0, 2.0)]}


def test_tensorboard_can_be_turned_off(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Namespace(no_tensorboard=True, use_tensorboard=True), stream=io.StringIO())
    log.step(0, {"train/loss": 2.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_trackers_count_optimizer_steps_when_asked(tmp_path: Path) -> None:
    args = Namespace(
        wandb_always_use_train_step=True, rollout_batch_size=8, n_samples_per_prompt=4, global_batch_size=16
    )
    log = RunLog(tmp_path, args, stream=io.StringIO())
    log.step(3, {"train/loss": 2.0})
    log.close()
    assert read_scalars(tmp_path) == {"train/loss": [(6, 2.0)]}
    assert lines_of(tmp_path)[0]["step"] == 3


@pytest.mark.parametrize(
    ("variable", "names", "expected"),
    [
        (None, {}, "run"),
        (None, {"tb_project_name": "math"}, "out/math"),
        (None, {"tb_project_name": "math", "tb_experiment_name": "a"}, "out/math/a"),
        ("/tb", {}, "/tb"),
        ("/tb", {"tb_project_name": "math", "tb_experiment_name": "a"}, "/tb/math/a"),
    ],
)
def test_where_tensorboard_files_go(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, names: dict[str, str], expected: str
) -> None:
    if variable:
        monkeypatch.setenv("TENSORBOARD_DIR", variable)
    assert tensorboard_dir(Namespace(run_dir="run", output_dir="out", **names)) == Path(expected)


def test_the_adapter_writes_where_the_arguments_say(tmp_path: Path) -> None:
    adapter = _TensorboardAdapter(Namespace(output_dir=str(tmp_path), tb_project_name="p", run_dir="unused"))
    adapter.log({"train/loss": 1.5}, 4)
    adapter.finish()
    assert read_scalars(tmp_path / "p") == {"train/loss": [(4, 1.5)]}


def test_the_driver_logs_without_importing_torch(tmp_path: Path) -> None:
    code = (
        "import sys, argparse\n"
        "from slime.observability.run_log import RunLog\n"
        "log = RunLog(sys.argv[1], argparse.Namespace())\n"
        "log.step(0, {'train/loss': 1.0})\n"
        "log.close()\n"
        "heavy = {'torch', 'tensorflow', 'ray', 'transformers', 'matplotlib', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT, timeout=60)


def test_the_step_line_is_the_one_of_the_house_style() -> None:
    metrics = {
        "rollout/raw_reward": 0.4128,
        "rollout/response_len/mean": 811.6,
        "train/kl_loss": 0.00312,
        "train/pg_clipfrac": 0.0181,
        "train/grad_norm": 0.4249,
        "perf/generate_time": 38.12,
        "perf/train_time": 21.44,
        "perf/sync_time": 1.93,
    }
    assert format_step(12, metrics) == (
        "step 12  reward 0.413  response 812 tok  kl 0.0031 nat  clipped 1.8 %  grad 0.42  "
        "gen 38.1 s  train 21.4 s  sync 1.9 s"
    )


def test_the_step_line_shows_the_log_prob_difference_and_evaluations() -> None:
    metrics = {"train/train_rollout_logprob_abs_diff": 3.14e-5, "eval/gsm8k": 0.5, "eval/gsm8k-pass@2": 0.75}
    assert format_step(0, metrics) == "step 0  train-rollout 3.1e-05 nat  eval gsm8k 0.500"


def test_the_step_line_does_not_hide_a_broken_number() -> None:
    assert format_step(-1, {"train/grad_norm": None}) == "before the first step  grad nan"


def test_scores_are_tasks_only() -> None:
    metrics = {
        "eval/step": 3,
        "eval/a": 0.1,
        "eval/a-truncated_ratio": 0.0,
        "eval/a/response_len/mean": 7,
        "train/loss": 1,
    }
    assert eval_scores(metrics) == {"a": 0.1}


class FakeWandbRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.is_finished = True


class FakeWandb:
    def __init__(self) -> None:
        self.run = FakeWandbRun()
        self.init_arguments: dict[str, Any] = {}

    def init(self, **arguments: Any) -> FakeWandbRun:
        self.init_arguments = arguments
        return self.run

    def login(self, **arguments: Any) -> None:
        self.login_arguments = arguments


def test_wandb_gets_the_metrics_with_their_axis_and_no_account_key(tmp_path: Path) -> None:
    wandb = FakeWandb()
    args = Namespace(wandb_key="secret", wandb_project="p", wandb_group="g", lr=1e-6, hook=print)
    adapter = WandbAdapter(args, tmp_path, wandb)
    adapter.log({"train/loss": 1.0}, 5)
    adapter.finish()
    assert wandb.run.logged == [{"rollout/step": 5, "train/step": 5, "eval/step": 5, "train/loss": 1.0}]
    assert wandb.run.axes["train/*"] == "train/step" and wandb.run.is_finished
    assert wandb.init_arguments["config"] == {"lr": 1e-6, "wandb_group": "g", "wandb_project": "p"}
    assert wandb.init_arguments["name"] == "g" and wandb.login_arguments == {"key": "secret"}


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    first, second = FakeWandb(), FakeWandb()
    WandbAdapter(Namespace(), tmp_path, first)
    WandbAdapter(Namespace(), tmp_path, second)
    assert first.init_arguments["id"] == second.init_arguments["id"]
    assert (tmp_path / RUN_ID_FILE).read_text().strip() == first.init_arguments["id"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_wandb_that_is_not_installed_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install wandb"):
        RunLog(tmp_path, Namespace(no_tensorboard=True, use_wandb=True), stream=io.StringIO())
