"""Whatever the layout, two Adam steps make the weights that one process makes.

Models and rollouts are drawn anew in every run. A failure names the seed: SLIME_TEST_SEED=that repeats the run.
"""

import ctypes
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.pool import RankPool

TENSOR = dict(tensor_model_parallel_size=2)
SEQUENCE = TENSOR | dict(sequence_parallel=True)
PIPELINE = dict(pipeline_model_parallel_size=2)
INTERLEAVED = PIPELINE | dict(virtual_pipeline_model_parallel_size=2)
OVERLAPPED = dict(overlap_grad_reduce=True, overlap_param_gather=True, ddp_bucket_size=5000)

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, TENSOR),
    "TP2 + SP": (2, SEQUENCE),
    "PP2": (2, PIPELINE),
    "PP2 in two chunks": (2, INTERLEAVED),
    "DP2": (2, {}),
    "DP2, overlapped": (2, OVERLAPPED),
    "TP2 x DP2": (4, TENSOR),
    "PP2 in two chunks x DP2, overlapped": (4, INTERLEAVED | OVERLAPPED),
    "TP2 x PP2 x DP2": (8, TENSOR | PIPELINE),
    "TP2 + SP x PP2 in two chunks x DP2, overlapped": (8, SEQUENCE | INTERLEAVED | OVERLAPPED),
}

SEED = int(os.environ.get("SLIME_TEST_SEED") or random.SystemRandom().randrange(10**6))


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


@pytest.fixture(scope="module", params=range(2), ids=["one shape", "another"])
def trained(
    request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tiny.Case, Path, dict[str, Any]]:
    """A case, its model, and what one process makes of it."""
    case = tiny.random_case(SEED + 10 * request.param)
    model = case.save(tmp_path_factory.mktemp("model"))
    return case, model, ranks.run(_train, 1, case.args(model), case.rollouts)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_makes_the_weights_of_one_process(
    ranks: RankPool, trained: tuple[tiny.Case, Path, dict[str, Any]], layout: str
) -> None:
    case, model, alone = trained
    print(f"SLIME_TEST_SEED={SEED}; {case}")
    world_size, sizes = LAYOUTS[layout]
    together = ranks.run(_train, world_size, case.args(model, **sizes), case.rollouts)
    assert tiny.largest_difference(alone["weights"], together[0]["weights"]) < 1e-6
    for name, expected in alone["metrics"][1].items():
        if name.startswith(("train/", "rollout/")):
            found = [result["metrics"][1][name] for result in together]
            assert found == pytest.approx([expected] * world_size, rel=1e-4, abs=1e-5), name


def _train_with_a_slow_first_stage(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    """Memory that is freed is overwritten at once, and stage 0 comes late to every message that was announced to it."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    ctypes.CDLL(None).mallopt(_M_PERTURB, 255)
    announced = P2PCommunicator._communicate_shapes

    def come_late(self: Any, *tensors: Any) -> Any:
        shapes = announced(self, *tensors)
        time.sleep(0.02 if self.pp_group.rank() == 0 else 0)
        return shapes

    P2PCommunicator._communicate_shapes = come_late
    return tiny.train(args, rank, world_size, port, rollouts)


_M_PERTURB = -6  # glibc's malloc.h


def test_a_stage_that_comes_late_receives_what_was_sent(
    ranks: RankPool, trained: tuple[tiny.Case, Path, dict[str, Any]]
) -> None:
    """An output must stay in memory until the next stage has it."""
    case, model, _ = trained
    print(f"SLIME_TEST_SEED={SEED}; {case}")
    together = ranks.run(_train_with_a_slow_first_stage, 2, case.args(model, **INTERLEAVED), case.rollouts[:1])
    first = ranks.run(_train, 1, case.args(model), case.rollouts[:1])[0]
    assert tiny.largest_difference(first["weights"], together[0]["weights"]) < 1e-6


def _train_and_save(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> None:
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    for i, data in enumerate(rollouts):
        trainer.train(i, tiny.shard_of(trainer, data))
    trainer.save(len(rollouts) - 1)
    trainer.close()


def test_chunks_save_what_whole_models_load(
    ranks: RankPool, trained: tuple[tiny.Case, Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The first step on four ranks with two chunks each, the second on two ranks with the whole model each."""
    case, model, alone = trained
    print(f"SLIME_TEST_SEED={SEED}; {case}")
    save = str(tmp_path / "checkpoints")
    ranks.run(_train_and_save, 4, case.args(model, save=save, **SEQUENCE, **INTERLEAVED), case.rollouts[:1])
    resumed = ranks.run(_train, 2, case.args(model, load=save), case.rollouts[1:])[0]
    assert resumed["start"] == 1
    assert tiny.largest_difference(alone["weights"], resumed["weights"]) < 1e-6
