"""Context-parallel slices: every token on exactly one rank, and the whole comes back with its gradient."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from slime.data.context_parallel import ContextParallel, chunk_ranges, logits_and_tokens_ranges
from tests.distributed.pool import RankPool


def ranks(size: int) -> list[ContextParallel]:
    return [ContextParallel(rank, size) for rank in range(size)]


def test_the_picture_of_the_module_is_true() -> None:
    held = [cp.slice_sequence(torch.arange(8), 0).tolist() for cp in ranks(2)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_ranges_by_hand() -> None:
    """L = 10, R = 6, cp = 2: chunks of 3. The logits of tokens 3..8 predict 4..9; rank 0 holds 0-2 and 9-11."""
    assert logits_and_tokens_ranges(10, 6, 0, 2) == (3, ((0, 3), (9, 12)), ((0, 0), (0, 0)), ((0, 0), (0, 0)))
    assert logits_and_tokens_ranges(10, 6, 1, 2) == (3, ((3, 6), (6, 9)), ((3, 6), (6, 9)), ((4, 7), (7, 10)))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 40), st.integers(0, 39), st.integers(1, 5))
def test_every_response_token_lies_on_exactly_one_rank(total: int, response: int, size: int) -> None:
    response = min(response, total - 1)
    values = list(range(response))
    held = [cp.slice_response(values, total, response) for cp in ranks(size)]
    assert sorted(v for part in held for v in part) == values
    for cp, part in zip(ranks(size), held, strict=True):
        assert cp.local_response_length(total, response) == len(part)
        assert cp.slice_response(torch.tensor(values), total, response).tolist() == part


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(2, 4))
def test_the_rank_that_predicts_a_token_holds_its_logits(total: int, response: int, size: int) -> None:
    """What `slice_response` gives a rank is what its own rows of the sequence predict, in the same order."""
    response = min(response, total - 1)
    sequence = torch.arange(total)
    for cp in ranks(size):
        chunk_size, chunks, logits, tokens = logits_and_tokens_ranges(total, response, cp.rank, size)
        rows = cp.slice_sequence(sequence, -1)
        assert rows.numel() == 2 * chunk_size
        predicting = []
        for k in range(2):
            start, end = (position - chunks[k][0] + k * chunk_size for position in logits[k])
            predicting += rows[start:end].tolist() if logits[k] != (0, 0) else []
        in_response = cp.slice_response(sequence[total - response :], total, response).tolist()
        assert [row + 1 for row in predicting] == in_response
        assert [t for a, b in tokens for t in range(a, b)] == in_response


def test_sequences_are_padded_by_value_or_by_function_along_the_first_axis() -> None:
    cp = ContextParallel(0, 2)
    rows = cp.slice_sequence(torch.ones(5, 2), 7)
    assert rows.tolist() == [[1, 1], [1, 1], [7, 7], [7, 7]]
    repeated = cp.slice_sequence(torch.arange(5), lambda t, n: torch.cat([t, t[-1:].expand(n)]))
    assert repeated.tolist() == [0, 1, 4, 4]


def test_without_context_parallelism_everything_is_whole() -> None:
    cp = ContextParallel()
    tokens = torch.arange(5)
    assert cp.slice_sequence(tokens, 0) is tokens
    assert cp.gather_response(tokens, 7, 5) is tokens
    assert chunk_ranges(5, 0, 1) == (3, ((0, 3), (3, 6)))


@pytest.mark.parametrize("per_token", [False, True])
def test_the_parts_of_all_ranks_sum_to_the_sum_of_sample_means(per_token: bool) -> None:
    totals, responses = [9, 4, 12], [5, 3, 11]
    generator = torch.Generator().manual_seed(0)
    masks = [(torch.rand(r, generator=generator) > 0.3).int() for r in responses]
    values = [torch.randn(r, generator=generator).double() for r in responses]
    whole = ContextParallel().get_sum_of_sample_mean(totals, responses, masks, None, per_token)(torch.cat(values))
    parts = []
    for cp in ranks(3):
        local = torch.cat([cp.slice_response(v, t, r) for v, t, r in zip(values, totals, responses, strict=True)])
        parts.append(cp.get_sum_of_sample_mean(totals, responses, masks, None, per_token)(local))
    torch.testing.assert_close(sum(parts), whole)


def test_wrong_lengths_and_a_missing_group_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values do not fit a response of 2"):
        ContextParallel(0, 2).slice_response(torch.zeros(3), 5, 2)
    with pytest.raises(ValueError, match="Rank 1 of 2 context-parallel ranks has no group"):
        ContextParallel(1, 2).gather_response(torch.zeros(1), 5, 2)


def _one_of_two_ranks(rank: int, world_size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    cp = ContextParallel(rank, 2, dist.group.WORLD)
    results = []
    for total, response in ((10, 6), (9, 8), (5, 1), (6, 0)):
        whole = torch.arange(response, dtype=torch.float64) + 1
        local = cp.slice_response(whole, total, response).clone().requires_grad_()
        gathered = cp.gather_response(local * 2, total, response)
        (cp.slice_response(gathered**2, total, response).sum()).backward()
        results.append((gathered.detach(), local.grad, cp.slice_response(whole, total, response)))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gathering_gives_the_whole_response_and_its_gradient_to_every_part(ranks: RankPool, tmp_path: Path) -> None:
    """y = 2 x gathered, loss = sum of y^2 over all ranks: dx = 8 x."""
    ranks.run(_one_of_two_ranks, 2, str(tmp_path))
    for rank in range(2):
        for (gathered, grad, local), response in zip(torch.load(tmp_path / f"{rank}.pt"), (6, 8, 1, 0), strict=True):
            assert gathered.tolist() == [2.0 * (i + 1) for i in range(response)]
            torch.testing.assert_close(grad, 8 * local)
