"""Metrics do not depend on how a step was divided over micro-batches and ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime.algorithm.metrics import (
    micro_batch_record,
    reduce_contributions,
    reduce_train_step_metrics,
    rollout_data_contributions,
)
from slime.data.context_parallel import ContextParallel
from tests.distributed.pool import RankPool


def record(loss: float, clipped: float, num_tokens: int = 0):
    return micro_batch_record({"loss": torch.tensor(loss), "clipped": torch.tensor(clipped)}, num_tokens)


def reduced(records, *, per_token: bool = False, gbs: int = 4, cp_size: int = 1, group=None):
    return reduce_train_step_metrics(
        records,
        calculate_per_token_loss=per_token,
        step_global_batch_size=gbs,
        cp_size=cp_size,
        dp_with_cp_group=group,
    )


def test_sums_become_means_over_rollouts_or_tokens() -> None:
    records = [record(1.0, 0.5, 3), record(3.0, 0.0, 5)]
    assert reduced(records) == {"loss": 1.0, "clipped": 0.125}
    assert reduced(records, per_token=True) == {"loss": 0.5, "clipped": 0.0625}


def test_context_parallel_ranks_counted_the_same_tokens() -> None:
    """Two ranks each counted all 4 tokens and hold half of the sum 6: 6 / 4."""
    records = [record(2.0, 0.0, 4), record(4.0, 0.0, 4)]
    assert reduced(records, per_token=True, cp_size=2)["loss"] == pytest.approx(1.5)


def test_a_metric_that_is_no_single_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'loss' of a loss must be a 0-dim tensor, got \(2,\)"):
        micro_batch_record({"loss": torch.zeros(2)})
    with pytest.raises(ValueError, match="'loss' of a loss must be a 0-dim tensor, got float"):
        micro_batch_record({"loss": 1.0})


def test_micro_batches_must_report_the_same_metrics() -> None:
    with pytest.raises(ValueError, match=r"\['loss', 'clipped'\] and \['loss'\]"):
        reduced([record(1.0, 1.0), micro_batch_record({"loss": torch.tensor(1.0)})])


def _one_of_two_ranks(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mine = [[record(1.0, 0.5, 3), record(3.0, 0.0, 5)], [record(4.0, 1.0, 2)]][rank]
    results = [reduced(mine, per_token=per_token, group=dist.group.WORLD) for per_token in (False, True)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_every_rank_gets_the_metrics_of_all(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_one_of_two_ranks, 2, str(tmp_path))
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [{"loss": 2.0, "clipped": 0.375}, {"loss": 0.8, "clipped": 0.15}]


def data(members: list[int], cp: ContextParallel) -> dict:
    totals, responses = [6, 5, 9], [4, 1, 5]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(r, generator=generator) for r in responses]
    masks = [torch.tensor([1, 0, 1, 1]), torch.tensor([1]), torch.tensor([1, 1, 1, 1, 0])]
    return {
        "total_lengths": [totals[i] for i in members],
        "response_lengths": [responses[i] for i in members],
        "loss_masks": [masks[i] for i in members],
        "rewards": [float(i) for i in members],
        "advantages": [cp.slice_response(rows[i], totals[i], responses[i]) for i in members],
        "source_names": ["a"] * len(members),
    }


def test_means_of_a_rollout_do_not_depend_on_the_ranks(make_args) -> None:
    def means(layout: list[list[int]], cp_size: int) -> dict[str, float]:
        parts = []
        for members in layout:
            for rank in range(cp_size):
                cp = ContextParallel(rank, cp_size)
                parts.append(
                    rollout_data_contributions(
                        make_args(), data(members, cp), dp_size=len(layout), num_rollouts=3, context_parallel=cp
                    )
                )
        return reduce_contributions(parts)

    alone = means([[0, 1, 2]], 1)
    assert set(alone) == {"total_lengths", "response_lengths", "rewards", "advantages"}
    assert alone["rewards"] == 1.0
    rows, masks = data([0, 1, 2], ContextParallel())["advantages"], data([0, 1, 2], ContextParallel())["loss_masks"]
    expected = sum(((row * mask).sum() / mask.sum()).item() for row, mask in zip(rows, masks, strict=True)) / 3
    assert alone["advantages"] == pytest.approx(expected)
    for layout, cp_size in (([[1], [2, 0]], 1), ([[0, 1, 2]], 2), ([[2], [0, 1]], 3)):
        assert means(layout, cp_size) == pytest.approx(alone)


def test_nothing_to_count_gives_no_metric() -> None:
    assert reduce_contributions([{"rewards": (0.0, 0.0)}, {}]) == {}
