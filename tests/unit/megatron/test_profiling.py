"""Traces of the trainer: of the rollouts, ranks and parts that were asked for, and of no others."""

import gzip
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.backends.megatron.profiling import MemoryHistory
from tests.distributed import tiny
from tests.distributed.pool import RankPool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("model"), "llama")


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)["start"]


def traces(ranks: RankPool, model: Path, folder: Path, targets: list[str], **changes: Any) -> dict[str, set[str]]:
    """File -> names of what it recorded, of a run of three rollouts that records the second."""
    asked = dict(
        use_pytorch_profiler=True, profile_target=targets, profile_step_start=1, profile_step_end=2, profile_ranks=[1],
        run_dir=str(folder),
    )  # fmt: skip
    args = tiny.training_args(model, **(asked | changes))
    ranks.run(_train, 2, args, [tiny.rollout(seed=3)] * 3)
    found = {}
    for path in sorted((folder / "profile").glob("*")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = {event.get("name", "") for event in events}
    return found


def test_a_trace_of_the_whole_training_names_its_parts(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    found = traces(ranks, model, tmp_path, ["train_overall"])
    assert list(found) == ["rollout_000001_train_overall_rank_1.json.gz"]
    names = found["rollout_000001_train_overall_rank_1.json.gz"]
    assert {"train_overall", "data_preprocess", "actor_train"} <= names
    assert any(name.startswith("aten::") for name in names)


def test_parts_are_recorded_alone(ranks: RankPool, model: Path, tmp_path: Path) -> None:
    """With a KL term there are passes of the reference model too."""
    with_reference = dict(use_kl_loss=True, kl_loss_coef=0.1)
    found = traces(ranks, model, tmp_path, ["train_actor", "train_log_probs"], **with_reference)
    assert list(found) == [
        "rollout_000001_actor_train_rank_1.json.gz",
        "rollout_000001_ref_log_probs_rank_1.json.gz",
    ]
    assert "data_preprocess" not in set().union(*found.values())


def test_a_snapshot_of_memory_is_written_once_after_so_many_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a stand-in for the CUDA allocator's functions, which need a GPU."""
    calls: list[Any] = []
    observers: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given["enabled"]))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    args = Namespace(record_memory_history=True, memory_snapshot_num_steps=2, memory_snapshot_dir=str(tmp_path / "m"))
    history = MemoryHistory(args, rank=3)
    for rollout_id in range(5, 9):
        history.trained(rollout_id)
    observers[0](0, 1, 2, 3)  # memory runs out when nothing is recorded any more
    assert calls == ["all", "memory_rollout_000006_rank_3.pickle", None]
    calls.clear()
    MemoryHistory(args, rank=0)
    observers[1](0, 1, 2, 3)
    assert calls == ["all", "memory_out_of_memory_rank_0.pickle"]
