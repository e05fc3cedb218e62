"""A run that is started again: what it will do again is taken out of its record, and nothing else."""

import io
import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slime.observability.digests import read_digests, write_digests
from slime.observability.report import summarise
from slime.observability.run_log import RunLog, read_metrics
from slime.observability.samples import write_eval_samples, write_samples
from slime.observability.tensorboard_utils import read_scalars
from slime.utils.types import Sample


def ledger_line(rollout_id: int) -> dict[str, Any]:
    return {"rollout_id": rollout_id, "trained": [[0, rollout_id]], "dropped": [], "discarded": [], "outstanding": []}


def write_step(log: RunLog, run_dir: Path, step: int, loss: float) -> None:
    """One step with everything that a run leaves of it; -1: before the first."""
    sample = Sample(index=step, tokens=[1], response="x", response_length=1)
    if step >= 0:
        write_samples(run_dir, step, [sample])
    write_eval_samples(run_dir, step, {"sums": {"samples": [sample]}})
    write_digests(run_dir, step + 2, {"w": str(loss)}, step)
    metrics = {"eval/sums": loss} if step < 0 else {"train/loss": loss, "rollout/raw_reward": 1.0}
    log.step(step, metrics, ledger_line(step) if step >= 0 else None)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed after step 4."""
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    folder = tmp_path / "run"
    log = RunLog(folder, Namespace(), stream=io.StringIO())
    assert log.begin(0) is None
    for step in range(-1, 5):
        write_step(log, folder, step, loss=float(step))
    log.close()
    return folder


def resumed(run_dir: Path, start: int) -> RunLog:
    log = RunLog(run_dir, Namespace(), stream=io.StringIO())
    assert log.begin(start) is None
    return log


def test_the_disk_is_waited_for_before_a_checkpoint_and_not_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    log = RunLog(tmp_path / "run", Namespace(), stream=io.StringIO())
    for step in range(2):
        write_step(log, tmp_path / "run", step, loss=0.5)
    assert synced == []
    log.put_to_disk()
    digests = ["version_000002.json", "version_000003.json"]
    assert synced == ["metrics.jsonl", "ledger.jsonl", *digests, "digests", "run"]
    synced.clear()
    write_step(log, tmp_path / "run", 2, loss=0.5)
    log.put_to_disk()
    assert synced == ["metrics.jsonl", "ledger.jsonl", "version_000004.json", "digests", "run"]
    log.close()


@pytest.mark.parametrize("left", ["", "\0" * 40, '{"version": 6, "rollout'], ids=["nothing", "zeros", "a part"])
def test_digests_that_a_loss_of_power_tore_go(run_dir: Path, left: str, caplog: pytest.LogCaptureFixture) -> None:
    torn = run_dir / "digests" / "version_000006.json"
    torn.write_text(left)
    resumed(run_dir, 3).close()
    assert not torn.exists() and f"{torn} holds no digests" in caplog.text
    assert sorted(read_digests(run_dir)) == [-1, 0, 1, 2]


def test_a_step_that_was_prepared_is_kept_beside_its_line_until_that_is_on_the_disk(run_dir: Path) -> None:
    prepared = run_dir / "unfinished_step.json"
    log = resumed(run_dir, 5)
    log.prepare(5, {"train/loss": 5.5}, ledger_line(5))
    log.step(5, {"train/loss": 5.5})
    assert prepared.exists()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:-1]))  # as after a loss of power
    again = RunLog(run_dir, Namespace(), stream=io.StringIO())
    assert again.begin(6) == {"train/loss": 5.5}
    again.close()
    assert prepared.exists(), "its line was not written"
    last = RunLog(run_dir, Namespace(), stream=io.StringIO())
    last.step(5, last.begin(6) or {})
    last.close()
    assert not prepared.exists()
    log.close()


def ledger_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["rollout_id"] for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "samples").iterdir())


def test_the_record_is_that_of_the_steps_before_the_checkpoint(run_dir: Path) -> None:
    """The evaluation before the first step stays."""
    resumed(run_dir, 2).close()
    assert [line["step"] for line in read_metrics(run_dir)] == [-1, 0, 1]
    assert ledger_of(run_dir) == [0, 1]
    assert names(run_dir) == [
        "eval_000000_sums.jsonl", "eval_000001_sums.jsonl", "eval_initial_sums.jsonl",
        "rollout_000000.jsonl", "rollout_000001.jsonl",
    ]  # fmt: skip
    assert sorted(read_digests(run_dir)) == [-1, 0, 1]
    assert summarise(run_dir)["steps"] == 2


def test_what_is_done_again_is_there_once_in_the_file_and_in_tensorboard(run_dir: Path) -> None:
    log = resumed(run_dir, 2)
    for step in range(2, 5):
        write_step(log, run_dir, step, loss=10.0 + step)
    log.close()
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [-1, 0, 1, 2, 3, 4]
    expected = [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert read_scalars(run_dir)["train/loss"] == expected
    events = EventAccumulator(str(run_dir)).Reload().Scalars("train/loss")  # type: ignore[no-untyped-call]
    assert [(event.step, event.value) for event in events] == expected, "TensorBoard itself sees the same"
    assert ledger_of(run_dir) == [0, 1, 2, 3, 4]


def test_without_a_checkpoint_everything_makes_way(run_dir: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="slime"):
        log = resumed(run_dir, 0)
    assert "has no checkpoint to go on from: its 6 line(s) of metrics.jsonl make way" in caplog.text
    assert (run_dir / "metrics.jsonl").read_text() == "" and ledger_of(run_dir) == [] and names(run_dir) == []
    write_step(log, run_dir, -1, loss=7.0)
    log.close()
    assert read_scalars(run_dir) == {"eval/sums": [(-1, 7.0)]}


def test_a_torn_last_line_goes(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "ledger.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write('{"step": 5, "rollout_id": 5, "tra')
    resumed(run_dir, 5).close()
    assert [line["step"] for line in read_metrics(run_dir)] == [-1, 0, 1, 2, 3, 4]
    assert ledger_of(run_dir) == [0, 1, 2, 3, 4]


def test_a_checkpoint_from_elsewhere_cuts_nothing_in_a_fresh_folder(tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level("INFO", logger="slime"):
        log = resumed(tmp_path / "fresh", 7)
    log.step(7, {"train/loss": 1.0}, ledger_line(7))
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "fresh")] == [7]
    assert "cut" not in caplog.text and "make way" not in caplog.text


def test_a_run_killed_between_its_checkpoint_and_its_line_loses_neither_line_nor_rows(run_dir: Path) -> None:
    log = resumed(run_dir, 5)
    log.prepare(5, {"train/loss": 5.5}, ledger_line(5))  # then the checkpoint is committed, then the run is killed
    again = RunLog(run_dir, Namespace(), stream=io.StringIO())
    assert again.begin(6) == {"train/loss": 5.5}
    assert ledger_of(run_dir) == [0, 1, 2, 3, 4, 5]
    again.step(5, {"train/loss": 5.5})
    again.step(6, {"train/loss": 6.5}, ledger_line(6))
    assert [line["step"] for line in read_metrics(run_dir)] == [*range(-1, 7)]
    assert ledger_of(run_dir) == [*range(7)]
    for each in (log, again):
        each.close()


def test_what_was_prepared_for_a_checkpoint_that_never_came_is_forgotten(run_dir: Path) -> None:
    log = resumed(run_dir, 5)
    log.prepare(5, {"train/loss": 5.5}, ledger_line(5))
    again = resumed(run_dir, 4)
    assert ledger_of(run_dir) == [0, 1, 2, 3]
    again.step(4, {"train/loss": 4.5}, ledger_line(4))
    for each in (log, again):
        each.close()
    resumed(run_dir, 6).close()


def test_a_prepared_step_is_accounted_for_once(run_dir: Path) -> None:
    log = resumed(run_dir, 5)
    log.prepare(5, {"train/loss": 5.5}, ledger_line(5))
    log.step(5, {"train/loss": 5.5}, ledger_line(5))
    log.close()
    assert ledger_of(run_dir) == [0, 1, 2, 3, 4, 5]
    assert not (run_dir / "unfinished_step.json").exists()


def test_digests_that_cannot_be_read_are_an_error_with_the_file(run_dir: Path) -> None:
    (run_dir / "digests" / "version_000003.json").write_text("{")
    with pytest.raises(ValueError, match=r"version_000003\.json holds no digests"):
        read_digests(run_dir)
