"""An engine that is started again gets room for as many tokens as at first, whoever has taken memory since."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from slime.backends.base import EngineSpec
from slime.backends.sglang.launch import server_command
from slime.ray import engine_places as module
from slime.ray.actor_group import RayTrainGroup
from slime.ray.engine_places import OwnEngine

TOKENS = 1_234_567


class Owner:
    """Answers `start` as an engine's actor does, at once."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.starts: list[Any] = []
        self.start = self.wait_until_healthy = self

    def remote(self, *arguments: Any) -> EngineSpec:
        self.starts.append(arguments)
        return self.spec


class Engine(OwnEngine):
    """With owners that are no actors."""

    def _place(self, part: EngineSpec) -> Any:
        return Owner(part)


class Client:
    def __init__(self, url: str, name: str) -> None: ...

    def cache_tokens(self) -> int:
        return TOKENS


def spec(node_rank: int = 0) -> EngineSpec:
    return EngineSpec(
        index=0, host="h", port=1, num_devices=2, device="cuda", device_ids=(0,), model_path="/m", dtype="bfloat16",
        threads=1, log_path=Path("/l"), weights_dir=Path("/w"), seed=1, num_nodes=2, node_rank=node_rank,
        overrides={"mem_fraction_static": 0.4},
    )  # fmt: skip


def starts(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[dict[str, Any]]:
    """What a server is started with besides its spec: at first, and when it has ended."""
    monkeypatch.setattr(module, "wait_for", lambda asked, *rest: list(asked.values()))
    monkeypatch.setattr(module.ray, "wait", lambda refs, **rest: (refs, []))
    monkeypatch.setattr(module, "SGLangClient", Client)
    args = Namespace(device="cuda", rollout_engine="sglang", colocate=True, offload_train=False)
    liveness: Any = Namespace(lost=dict)
    engine = Engine(Namespace(**vars(args) | changes), [spec(0), spec(1)], None, liveness)
    for _ in range(2):
        engine.begin()
        engine.wait_until_healthy()
    first, second = engine._actors
    begun = [arguments for arguments in first.starts if len(arguments) == 2]
    assert second.starts == [(*arguments, spec(0)) for arguments in begun], "all nodes of an engine start alike"
    return [overrides for _, overrides in begun]


def test_beside_a_trainer_that_stays_on_the_gpu_its_size_is_said_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starts(monkeypatch) == [{}, {"max_total_tokens": TOKENS, "mem_fraction_static": 0.9}]


@pytest.mark.parametrize("changes", [{"colocate": False}, {"offload_train": True}, {"device": "cpu"}])
def test_where_memory_is_as_free_as_at_first_its_share_says_its_size(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A trainer that gives its memory back leaves its weights for a sync: more of a large model than a tenth."""
    assert starts(monkeypatch, **changes) == [{}, {}]


@pytest.mark.parametrize(("offload_train", "asked"), [(False, ["empty_cache"]), (True, [])])
def test_a_trainer_makes_room_for_an_engine_only_where_it_stays(
    monkeypatch: pytest.MonkeyPatch, offload_train: bool, asked: list[str]
) -> None:
    """A sleeping trainer keeps nothing, and one on other devices may be at work and is not waited for."""
    calls: list[str] = []
    args = Namespace(device="cuda", rollout_engine="sglang", colocate=True, offload_train=offload_train)
    trainer = RayTrainGroup(args, None)
    monkeypatch.setattr(trainer, "_call", lambda method, **words: calls.append(method))
    trainer.make_room()
    assert calls == asked


def test_the_tokens_reach_the_command_line_in_place_of_the_plans_share() -> None:
    args = Namespace(engine_memory_fraction=0.5, colocate=True)
    overrides = {"max_total_tokens": TOKENS, "mem_fraction_static": 0.9}
    again = EngineSpec(**{**vars(spec()), "overrides": overrides, "num_nodes": 1})
    argv, _ = server_command(args, again)
    words = " ".join(argv)
    assert f"--max-total-tokens {TOKENS}" in words and words.count("--mem-fraction-static") == 1
    assert "--mem-fraction-static 0.9" in words
