"""Log-probs and entropies against plain math, gradients against finite differences, and the split vocabulary."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from slime.losses.log_probs import log_probs_and_entropy, nucleus_keep_mask
from tests.distributed.pool import RankPool


def reference(logits: list[float], target: int, temperature: float = 1.0) -> tuple[float, float]:
    scaled = [x / temperature for x in logits]
    total = math.fsum(math.exp(x) for x in scaled)
    probs = [math.exp(x) / total for x in scaled]
    return math.log(probs[target]), -math.fsum(p * math.log(p) for p in probs)


def test_a_fair_coin_has_log_prob_and_entropy_of_log_two() -> None:
    log_probs, entropy = log_probs_and_entropy(torch.zeros(1, 2), torch.tensor([1]), with_entropy=True)
    assert log_probs.item() == pytest.approx(-math.log(2))
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_equal_a_plain_float64_computation(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 11, generator=generator, dtype=torch.float64) * 3
    targets = torch.tensor([0, 10, 3, 3, 7, 1])
    log_probs, entropy = log_probs_and_entropy(logits, targets, temperature=temperature, with_entropy=True)
    assert entropy is not None
    for row in range(6):
        expected = reference(logits[row].tolist(), int(targets[row]), temperature)
        assert (log_probs[row].item(), entropy[row].item()) == pytest.approx(expected, rel=1e-12)


def test_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16, requires_grad=True)
    log_probs, _ = log_probs_and_entropy(logits, torch.tensor([2]))
    assert log_probs.dtype == torch.float32
    assert log_probs.item() == pytest.approx(reference([1, 2, 3], 2)[0], rel=1e-6)
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_huge_logits_do_not_overflow() -> None:
    log_probs, entropy = log_probs_and_entropy(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), with_entropy=True)
    assert log_probs.item() == -1e4
    assert entropy is not None
    assert entropy.item() == 0.0


def test_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, 0, 2, 2])
    keep = torch.rand(4, 5, generator=generator) > 0.5

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropy = log_probs_and_entropy(x, targets, temperature=0.8, with_entropy=True)
        assert entropy is not None
        return log_probs, entropy

    assert torch.autograd.gradcheck(both, (logits,))
    assert torch.autograd.gradcheck(lambda x: log_probs_and_entropy(x, targets, keep_mask=keep)[0], (logits,))


def test_entropy_carries_no_gradient_unless_wanted() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([0, 1]), with_entropy=True, with_entropy_grad=False)
    assert entropy is not None
    assert not entropy.requires_grad
    assert log_probs.requires_grad


def test_an_impossible_token_does_not_poison_the_entropy_or_its_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")]], requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([0]), with_entropy=True)
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))
    (log_probs + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0]]


def test_no_rows_give_empty_results_that_still_reach_the_model() -> None:
    hidden = torch.zeros(0, 3, requires_grad=True)
    log_probs, entropy = log_probs_and_entropy(hidden * 1, torch.zeros(0, dtype=torch.long), with_entropy=True)
    assert entropy is not None
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad is not None


def test_a_nucleus_renormalises_and_always_keeps_the_target() -> None:
    """Of four equal tokens the nucleus {0, 1} leaves 1/2 each; a target outside it is one of three."""
    logits = torch.zeros(3, 4)
    keep = nucleus_keep_mask(torch.tensor([0, 1, 0, 1]), torch.tensor([0, 2, 4, 4]), 4)
    assert keep.tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]
    log_probs, entropy = log_probs_and_entropy(logits, torch.tensor([0, 3, 2]), with_entropy=True, keep_mask=keep)
    assert log_probs.exp().tolist() == pytest.approx([1 / 2, 1 / 3, 1.0])
    assert entropy is not None
    assert entropy.exp().tolist() == pytest.approx([4.0, 4.0, 4.0])


def test_a_nucleus_mask_of_one_vocabulary_part_holds_its_own_ids_only() -> None:
    keep = nucleus_keep_mask(torch.tensor([0, 5, 6]), torch.tensor([0, 1, 3]), 4, first_token_id=4)
    assert keep.tolist() == [[False] * 4, [False, True, True, False]]


def test_offsets_that_do_not_fit_the_kept_ids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rise from 0 to the number of ids \(3\)"):
        nucleus_keep_mask(torch.tensor([0, 1, 2]), torch.tensor([0, 2]), 4)


def _one_of_two_vocabulary_ranks(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name, keep in _keep_masks().items():
        part = _logits()[:, rank * 4 : rank * 4 + 4].clone().requires_grad_()
        log_probs, entropy = log_probs_and_entropy(
            part,
            _TARGETS,
            with_entropy=True,
            keep_mask=None if keep is None else keep[:, rank * 4 : rank * 4 + 4],
            group=dist.group.WORLD,
        )
        (log_probs.sum() + (entropy * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        results[name] = (log_probs.detach(), entropy.detach(), part.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


_TARGETS = torch.tensor([1, 6, 4])


def _logits() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _keep_masks() -> dict[str, torch.Tensor | None]:
    return {"all": None, "nucleus": torch.rand(3, 8, generator=torch.Generator().manual_seed(3)) > 0.4}


def test_two_halves_of_the_vocabulary_give_what_the_whole_gives(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(_one_of_two_vocabulary_ranks, 2, str(tmp_path))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, keep in _keep_masks().items():
        whole = _logits().requires_grad_()
        log_probs, entropy = log_probs_and_entropy(whole, _TARGETS, with_entropy=True, keep_mask=keep)
        assert entropy is not None
        (log_probs.sum() + (entropy * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        for rank in range(2):
            torch.testing.assert_close(parts[rank][name][0], log_probs.detach())
            torch.testing.assert_close(parts[rank][name][1], entropy.detach())
        torch.testing.assert_close(torch.cat([parts[0][name][2], parts[1][name][2]], dim=1), whole.grad)
