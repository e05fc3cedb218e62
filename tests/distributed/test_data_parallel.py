"""Two data-parallel ranks train what one process trains."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.pool import RankError, RankPool


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any) -> Any:
    return tiny.train(args, rank, world_size, port, rollouts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_hf_model(tmp_path_factory.mktemp("qwen3"), "qwen3")


ROLLOUTS = [tiny.rollout(seed=1), tiny.rollout(seed=2)]


@pytest.mark.parametrize("optimizer", ["distributed", "replicated"])
@pytest.mark.parametrize("reduction", ["per sample", "per token"])
def test_two_ranks_make_the_weights_of_one_process(
    ranks: RankPool, model: Path, optimizer: str, reduction: str
) -> None:
    """Two Adam steps, samples of unequal length, dropped tokens: the weights differ by rounding only."""
    args = tiny.training_args(
        model, use_distributed_optimizer=optimizer == "distributed", calculate_per_token_loss=reduction == "per token"
    )
    alone = ranks.run(_train, 1, args, ROLLOUTS)[0]
    together = ranks.run(_train, 2, args, ROLLOUTS)
    assert tiny.largest_difference(alone["weights"], together[0]["weights"]) < 1e-6
    for name in ("train/loss", "train/pg_loss", "train/grad_norm", "train/entropy_loss", "rollout/advantages"):
        for step in range(2):
            expected = alone["metrics"][step][name]
            assert together[0]["metrics"][step][name] == pytest.approx(expected, abs=1e-5), name
            assert together[1]["metrics"][step][name] == together[0]["metrics"][step][name], name
    assert not together[1]["weights"], "buckets of ranks other than 0 are empty"


def _with_untrained_rank(num_samples: int = 8) -> dict[str, Any]:
    """Micro-batches of two are dealt to the ranks in turn, so rank 1 gets samples 2, 3, 6 and 7: nothing to train."""
    data = tiny.rollout(seed=5, response_lengths=[4, 6, 3, 0, 5, 2, 0, 4])
    for i in (2, 3, 6, 7):
        data["loss_masks"][i] = [0] * data["response_lengths"][i]
        data["rollout_mask_sums"][i] = 0
    return data


@pytest.mark.parametrize("reduction", ["per sample", "per token"])
def test_a_rank_without_a_trainable_token_neither_hangs_nor_disturbs(
    ranks: RankPool, model: Path, reduction: str
) -> None:
    args = tiny.training_args(model, calculate_per_token_loss=reduction == "per token", normalize_advantages=True)
    rollouts = [_with_untrained_rank(), ROLLOUTS[0]]
    alone = ranks.run(_train, 1, args, rollouts)[0]
    together = ranks.run(_train, 2, args, rollouts)[0]
    assert tiny.largest_difference(alone["weights"], together["weights"]) < 1e-6
    assert all(value == value for metrics in together["metrics"] for value in metrics.values()), "no NaN"


def test_gradients_and_weights_may_travel_while_others_are_computed(ranks: RankPool, model: Path) -> None:
    """--overlap-grad-reduce and --overlap-param-gather: who reads weights between steps still finds the new ones."""
    args = tiny.training_args(model)
    alone = ranks.run(_train, 1, args, ROLLOUTS)[0]
    overlapped = tiny.training_args(model, overlap_grad_reduce=True, overlap_param_gather=True)
    together = ranks.run(_train, 2, overlapped, ROLLOUTS)[0]
    assert tiny.largest_difference(alone["weights"], together["weights"]) < 1e-6


def test_bfloat16_learns_what_float32_learns(ranks: RankPool, model: Path) -> None:
    """Weights and activations in bf16, sums and the optimizer in float32: losses and weights agree to bf16's digits."""
    exact = ranks.run(_train, 1, tiny.training_args(model), ROLLOUTS)[0]
    rounded = ranks.run(_train, 2, tiny.training_args(model, bf16=True), ROLLOUTS)[0]
    assert {tensor.dtype for tensor in rounded["weights"].values()} == {torch.bfloat16}
    assert tiny.largest_difference(exact["weights"], rounded["weights"]) < 0.01
    for ours, theirs in zip(rounded["metrics"], exact["metrics"], strict=True):
        assert ours["train/entropy_loss"] == pytest.approx(theirs["train/entropy_loss"], rel=0.01)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.05)


def test_ranks_that_do_not_meet_say_who_waited_for_whom(ranks: RankPool, model: Path) -> None:
    args = tiny.training_args(model, distributed_timeout_minutes=0.01)
    with pytest.raises(
        RankError, match=r"Training rank 1 of 2 did not meet the others at 127\.0\.0\.1:\d+ within 0.01"
    ):
        ranks.run(_come_alone, 1, args)


def _come_alone(rank: int, world_size: int, port: int, args: Any) -> None:
    from slime.backends.megatron.trainer import MegatronTrainer

    MegatronTrainer(args, 1, 2, "127.0.0.1", port).init()
