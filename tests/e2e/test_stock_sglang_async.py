"""Asynchronous training on a stock SGLang server: weights over gloo under requests in flight, in every pause mode."""

import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.backends.sglang.launch import PYTHON_VARIABLE, server_command
from slime.utils.processes import ServerProcess, free_port

from .conftest import FinishedRun, LiveRun, Train
from .test_asynchronous import AHEAD, POOL, PROGRAM, assert_in_order, rows

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

HOST = "127.0.0.1"
NUM_ROLLOUT = 6
EXACT = ["--rollout-max-response-len", "300", "--custom-generate-function-path", "benchmarks/exact_length.py:generate"]
"""Every reply takes longer than a training step, so that updates meet requests in flight."""


@pytest.fixture(scope="module")
def server(tiny_flags: list[str], stock_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stock server of the tiny model. Runs find it as the one before left it."""
    folder = tmp_path_factory.mktemp("server")
    model = tiny_flags[tiny_flags.index("--hf-checkpoint") + 1]
    spec = EngineSpec(
        index=0, host=HOST, port=free_port(HOST), num_devices=1, device="cpu", device_ids=(), model_path=model,
        dtype="float32", threads=1, log_path=folder / "server.log", weights_dir=folder, seed=0,
        nccl_port=free_port(HOST),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(PYTHON_VARIABLE, str(stock_python))
        server = ServerProcess("stock server", *server_command(Namespace(), spec), spec.log_path)
    server.start()
    server.wait_until_healthy(f"{spec.url}/health", 280)
    yield f"{HOST}:{spec.port}"
    server.terminate(1.0)


@pytest.fixture
def flags(tiny_flags: list[str], server: str) -> list[str]:
    at = tiny_flags.index("--rollout-num-gpus")
    prompts = tiny_flags[tiny_flags.index("--prompt-data") + 1]
    return [
        *(*tiny_flags[:at], *tiny_flags[at + 2 :], *EXACT, "--num-rollout", str(NUM_ROLLOUT)),
        *("--rollout-engine", "sglang", "--rollout-external-engine-addrs", server),
        *("--eval-interval", "2", "--eval-prompt-data", "held", f"{prompts}@[0:4]", "--eval-temperature", "0"),
        *("--eval-max-response-len", "8"),
    ]


@pytest.mark.parametrize(
    ("kind", "mode", "limit"), [(POOL, "abort", 2), (POOL, "retract", 2), (POOL, "in_place", 2), (AHEAD, "abort", 4)]
)
def test_weights_change_under_requests_in_flight(
    train: Train, flags: list[str], kind: list[str], mode: str, limit: int
) -> None:
    run: FinishedRun = train([*flags, *kind, "--pause-generation-mode", mode, "--use-tis"], program=PROGRAM)
    assert_in_order(run.folder, NUM_ROLLOUT, limit)
    assert any(len(set(row["weight_versions"])) > 1 for row in rows(run.folder)), "no sample met an update"
    assert all(row["weight_versions"] for row in rows(run.folder)), "a sample of unknown age"
    assert all(row["response_length"] == 300 for row in rows(run.folder)), "a sample was cut by an update"
    assert len(run.column("eval/held")) == 3
    differences = run.column("train/train_rollout_logprob_abs_diff")
    assert differences[0] < 1e-4, "the first rollout is on policy"


def test_a_run_that_was_killed_in_a_sync_goes_on_with_the_server_that_it_left(
    begin: Callable[..., LiveRun], flags: list[str], server: str
) -> None:
    """The server is then paused, in a group with a trainer that is no more, perhaps amid an update of its weights."""
    words = [*flags, *AHEAD, "--save-interval", "1"]
    first = begin(words, PROGRAM)
    first.wait_for_phase("sync", 3)
    os.kill(first.process.pid, signal.SIGKILL)
    first.close()
    second = begin(words, PROGRAM)
    assert second.process.wait(300) == 0, second.output[-6000:]
    assert_in_order(second.folder, NUM_ROLLOUT, limit=4)
    client = SGLangClient(f"http://{server}", "the server")
    assert client.num_requests() == 0
    client.close()
