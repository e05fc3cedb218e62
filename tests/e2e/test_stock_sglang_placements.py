"""Stock SGLang servers that somebody else started, and groups of servers with routers of their own."""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.backends.sglang.launch import server_command
from slime.utils.processes import ServerProcess, free_port
from tests.contracts.engine.tiny_model import save_tiny_model

from .conftest import LiveRun, Train

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1200)]

HOST = "127.0.0.1"


@pytest.fixture
def flags(tmp_path: Path, stock_python: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for one trainer rank and two steps; which engines serve is left out."""
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", str(stock_python))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{a} + {a} =", "label": "{2 * a}"}}\n' for a in range(8)))
    return [
        *("--rollout-engine", "sglang", "--hf-checkpoint", str(save_tiny_model(tmp_path / "llama"))),
        *("--prompt-data", str(prompts), "--rm-type", "random", "--no-bf16", "--num-steps-per-rollout", "1"),
        *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--lr", "1e-3", "--lr-decay-style", "constant"),
        *("--actor-num-gpus-per-node", "1", "--rollout-max-response-len", "8", "--num-rollout", "2"),
    ]


@pytest.fixture
def servers(flags: list[str], tmp_path: Path) -> Iterator[list[ServerProcess]]:
    """Two stock servers of the model that ask for a key, and for another to control them; no run knows of them."""
    keys = Namespace(sglang_api_key="key", sglang_admin_api_key="admin")
    started = []
    for index in range(2):
        spec = EngineSpec(
            index=index, host=HOST, port=free_port(HOST), num_devices=1, device="cpu", device_ids=(),
            model_path=str(tmp_path / "llama"), dtype="float32", threads=1, log_path=tmp_path / f"{index}.log",
            weights_dir=tmp_path, seed=index, nccl_port=free_port(HOST),
        )  # fmt: skip
        server = ServerProcess(spec.url, *server_command(keys, spec), spec.log_path)
        server.start()
        started.append(server)
    for server in started:
        server.wait_until_healthy(f"{server.name}/health", 280)
    yield started
    for server in started:
        server.terminate(1.0)


def test_a_run_uses_servers_elsewhere_and_leaves_them_running(
    train: Train, begin: Callable[[list[str]], LiveRun], flags: list[str], servers: list[ServerProcess], tmp_path: Path
) -> None:
    addresses = [server.name.removeprefix("http://") for server in servers]
    words = [*flags, "--rollout-external-engine-addrs", *addresses]
    words += ["--sglang-api-key", "key", "--sglang-admin-api-key", "admin"]
    run = train(words)
    assert [step["step"] for step in run.steps] == [0, 1]
    assert max(run.column("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert run.output.count("on 2 engine(s)") == 3
    assert all(server.is_running for server in servers)

    (tmp_path / "second").mkdir()
    servers[1].terminate(0.1)
    refused = begin(words)
    assert refused.process.wait(240) == 1
    assert f"external engine 1 ({servers[1].name})" in refused.output
    assert servers[0].is_running


def test_groups_of_servers_have_models_routers_and_settings_of_their_own(
    train: Train, flags: list[str], tmp_path: Path
) -> None:
    """The trained model on one engine; the same folder as a model that stays as it is on another."""
    engines = tmp_path / "engines.yaml"
    judge = {"name": "judge", "update_weights": False, "server_groups": [{"num_gpus": 1}]}
    actor = {"name": "actor", "server_groups": [{"num_gpus": 1, "overrides": {"max_total_tokens": 5000}}]}
    engines.write_text(json.dumps({"sglang": [actor, judge]}))
    run = train([*flags, "--sglang-config", str(engines)])
    assert [step["step"] for step in run.steps] == [0, 1]
    assert max(run.column("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert run.output.count("on 1 engine(s)") == 3
    logs = {path.name: path.read_text() for path in (run.folder / "logs").glob("*.log")}
    assert {"router.log", "router_of_judge.log"} <= logs.keys()
    assert (
        "max_total_num_tokens=5000" in logs["engine_0.log"] and "max_total_num_tokens=5000" not in logs["engine_1.log"]
    )
