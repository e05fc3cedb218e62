"""Stock SGLang servers that die or stop: whole, or the scheduler process alone, which the front process outlives."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from slime.observability.ledger import check_ledger
from slime.observability.run_log import read_metrics
from tests.contracts.engine.tiny_model import save_tiny_model
from tests.run_processes import marked_pids, wait_until

from .conftest import LiveRun

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1500)]

LONG_REPLIES = ("--rollout-max-response-len", "300")  # so that a signal comes while they are made
END_WITHIN_S = 60


@pytest.fixture
def flags(tmp_path: Path, stock_python: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for two stock servers, two trainer ranks and a health check that waits 4 s."""
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", str(stock_python))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{a} + {a} =", "label": "{2 * a}"}}\n' for a in range(8)))
    return [
        *("--rollout-engine", "sglang", "--hf-checkpoint", str(save_tiny_model(tmp_path / "llama"))),
        *("--prompt-data", str(prompts), "--rm-type", "random", "--no-bf16", "--num-steps-per-rollout", "1"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "2", *LONG_REPLIES),
        *("--rollout-health-check-interval", "1", "--rollout-health-check-timeout", "4"),
    ]


def server(run: LiveRun, name: str) -> psutil.Process:
    """The process that status.json calls so, where it runs."""

    def find() -> psutil.Process | None:
        for process in run.status().get("processes", []):
            if process["name"] == name and psutil.pid_exists(process["pid"]):
                return psutil.Process(process["pid"])
        return None

    return wait_until(find, timeout_s=120)


def scheduler(run: LiveRun, name: str) -> psutil.Process:
    """The process of a server that runs the model."""
    children = server(run, name).children(recursive=True)
    found = [child for child in children if "sglang::scheduler" in " ".join(child.cmdline())]
    assert len(found) == 1, f"{name}: {[(child.pid, child.cmdline()) for child in children]}"
    return found[0]


def restarts(run: LiveRun) -> int:
    return run.output.count("serves again at")


def wait_for_restart(run: LiveRun, number: int) -> None:
    def is_there() -> bool:
        assert run.process.poll() is None, run.output[-6000:]
        return restarts(run) >= number

    wait_until(is_there, timeout_s=300)


def test_a_server_that_dies_or_stops_is_started_again_and_every_sample_is_made_once(
    begin: Callable[[list[str]], LiveRun], flags: list[str]
) -> None:
    run = begin([*flags, "--use-fault-tolerance", "--num-rollout", "6"])
    token = run.token
    attacks: list[tuple[Callable[[LiveRun, str], psutil.Process], str, signal.Signals]] = [
        (server, "engine 0", signal.SIGKILL),
        (scheduler, "engine 1", signal.SIGKILL),
        (server, "engine 1", signal.SIGSTOP),
        (scheduler, "engine 0", signal.SIGSTOP),
    ]
    for number, (find, name, sign) in enumerate(attacks):
        run.wait_for_phase("generate", rollout_id=number)
        find(run, name).send_signal(sign)
        wait_for_restart(run, number + 1)
    run.wait_for_phase("generate", rollout_id=len(attacks))
    server(run, "router").send_signal(signal.SIGSTOP)
    assert run.process.wait(300) == 0, run.output[-6000:]
    steps = [line for line in read_metrics(run.folder) if line["step"] >= 0]
    assert [step["step"] for step in steps] == list(range(6))
    assert check_ledger(run.folder).num_rollouts == 6
    # A restarted engine that had served old weights would show here.
    assert max(step["train/train_rollout_logprob_abs_diff"] for step in steps) < 1e-4
    assert restarts(run) == len(attacks)
    wait_until(lambda: not marked_pids(token), timeout_s=15)


def test_without_fault_tolerance_the_death_of_a_scheduler_ends_the_run_by_name(
    begin: Callable[[list[str]], LiveRun], flags: list[str]
) -> None:
    run = begin([*flags, "--num-rollout", "3"])
    token = run.token
    run.wait_for_phase("generate", rollout_id=1)
    scheduler(run, "engine 1").kill()
    assert run.process.wait(END_WITHIN_S) == 1
    assert "engine 1 (http://" in run.output
    assert "--use-fault-tolerance" in run.output
    wait_until(lambda: not marked_pids(token), timeout_s=15)


def test_the_death_of_a_trainer_rank_ends_the_run_and_the_next_start_resumes(
    begin: Callable[[list[str]], LiveRun], flags: list[str]
) -> None:
    words = [*flags, "--num-rollout", "3", "--save-interval", "1"]
    run = begin(words)
    token = run.token
    run.wait_for_phase("generate", rollout_id=2)
    os.kill(server(run, "actor rank 0").pid, signal.SIGKILL)
    assert run.process.wait(END_WITHIN_S) == 1
    assert "actor rank 0" in run.output
    wait_until(lambda: not marked_pids(token), timeout_s=15)
    again = begin(words)
    assert again.process.wait(300) == 0, again.output[-6000:]
    steps = [line["step"] for line in read_metrics(again.folder) if line["step"] >= 0]
    assert steps == [0, 1, 2]


KILLER = """
import json, os, pathlib, signal


def kill_the_sleeping_server(args, rollout_id, step_id, *_):
    if rollout_id == 1 and step_id == 0:
        processes = json.loads((pathlib.Path(args.run_dir) / "status.json").read_text())["processes"]
        os.kill(next(p["pid"] for p in processes if p["name"] == "engine 0"), signal.SIGKILL)
"""


def test_a_server_that_takes_turns_with_the_trainer_may_die_awake_and_asleep(
    begin: Callable[[list[str]], LiveRun], flags: list[str], tmp_path: Path
) -> None:
    """It gave its memory back when it dies the second time; what is started then holds all of it and no weights."""
    (tmp_path / "killer.py").write_text(KILLER)
    hook = ("--custom-megatron-before-train-step-hook-path", f"{tmp_path / 'killer.py'}:kill_the_sleeping_server")
    turns = ("--colocate", "--offload", "--rollout-num-gpus", "1", "--use-fault-tolerance", "--num-rollout", "3")
    run = begin([*flags, *turns, *hook])
    run.wait_for_phase("generate", rollout_id=0)
    server(run, "engine 0").kill()
    assert run.process.wait(600) == 0, run.output[-6000:]
    steps = [line for line in read_metrics(run.folder) if line["step"] >= 0]
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert check_ledger(run.folder).num_rollouts == 3
    assert max(step["train/train_rollout_logprob_abs_diff"] for step in steps) < 1e-4
    assert run.output.count("engine 0 (http://") >= 2 and run.output.count("It is started again.") == 2
