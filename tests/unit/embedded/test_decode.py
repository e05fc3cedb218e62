"""Decoding one sequence goes other ways than decoding many: both compute the same."""

import pytest
import torch
from torch import nn

from slime.backends.embedded.attention import LONE_VALUES, DecodeBatch, DecodeBatches, LoneDecode
from slime.backends.embedded.cache import KVShape, SlotCache
from slime.backends.embedded.linear import FEW_NORM_ROWS, FusedRMSNorm


def filled_cache(dtype: torch.dtype, length: int) -> SlotCache:
    """One layer of 2 key-value heads, the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    cache = SlotCache([KVShape(num_heads=2, key_dim=16, value_dim=8)], 4, length, dtype)
    cache.reserve(2, length)
    for memory in (cache.keys[0], cache.values[0]):
        memory.copy_(torch.randn(memory.shape, generator=generator))
    return cache


@pytest.mark.parametrize("window", [None, 1, 5, 500])
@pytest.mark.parametrize("position", [0, 1, 31, 32, 70])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str)
def test_a_lone_sequence_attends_as_among_others(dtype, tolerance, position, window):
    """Four query heads; positions beyond the sequence's end hold numbers that must not be looked at."""
    query, key, value = (torch.randn(heads, 1, size).to(dtype) for heads, size in ((4, 16), (2, 16), (2, 8)))
    outs, caches = [], []
    for kind in ("lone", "among others"):
        cache = filled_cache(dtype, 128)
        batch = LoneDecode(cache, position) if kind == "lone" else DecodeBatch(torch.tensor([position]))
        outs.append(batch.attend(0, query, key, value, cache, 0.25, window).float())
        caches.append(cache)
    assert outs[0].shape == (1, 4, 8)
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=tolerance)
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    assert torch.equal(caches[0].values[0], caches[1].values[0])


def test_a_sequence_goes_alone_unless_it_is_too_long_to_be_kept_twice():
    cache = filled_cache(torch.bfloat16, 64)
    batches = DecodeBatches(cache)
    assert cache.widest == 2 * 16
    fits = LONE_VALUES // cache.widest
    assert isinstance(batches.next([fits - 1]), LoneDecode)
    assert isinstance(batches.next([fits]), DecodeBatch)
    assert isinstance(batches.next([3, 4]), DecodeBatch)


def test_a_lone_sequence_is_widened_once_until_something_happens_to_its_row():
    cache = filled_cache(torch.bfloat16, 64)
    batches = DecodeBatches(cache)
    first = batches.next([10])
    assert batches.next([11]) is first
    assert batches.next([13]) is not first, "another sequence: its positions do not follow"
    second = batches.next([14])
    batches.forget()
    assert batches.next([15]) is not second, "a prompt was computed"
    third = batches.next([16])
    batches.next([17, 5])
    assert batches.next([18]) is not third, "another sequence ran, which may have left its row"
    fourth = batches.next([19])
    cache.reserve(2, 128)
    assert batches.next([20]) is not fourth, "the cache has grown"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_a_lone_sequence_see_what_the_cache_holds(dtype):
    """What is kept beside the cache is what a fresh look at the cache gives."""
    cache = filled_cache(dtype, 64)
    batches = DecodeBatches(cache)
    for position in range(40, 45):
        query, key, value = (torch.randn(heads, 1, size).to(dtype) for heads, size in ((4, 16), (2, 16), (2, 8)))
        kept = batches.next([position]).attend(0, query, key, value, cache, 0.25, None)
        assert torch.equal(kept, LoneDecode(cache, position).attend(0, query, key, value, cache, 0.25, None))


@pytest.mark.parametrize("num_rows", [1, FEW_NORM_ROWS, FEW_NORM_ROWS + 1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_few_rows_are_normalized_as_many_are(num_rows: int, scale: float):
    """Rounded once to bf16: off by half of its last bit, at most 2**-8 of the number; also where x has a mean."""
    norm = FusedRMSNorm(nn.Parameter(torch.randn(96).bfloat16(), requires_grad=False), 1e-5)
    x = ((torch.randn(num_rows, 96) + 2) * scale).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=2**-7.95, atol=1e-9)


def test_few_rows_are_normalized_with_the_weight_of_now():
    """Written where it is, given back, and put elsewhere: as the engine's memory is."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
    norm, x = FusedRMSNorm(weight, 0.0), torch.ones(1, 4, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert norm(x).tolist() == [[1, 1, 1, 1]]
        weight.data[:] = 2
        assert norm(x).tolist() == [[2, 2, 2, 2]]
    weight.data = torch.empty(0, dtype=torch.bfloat16)
    weight.data = torch.full((4,), 3.0, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert norm(x).tolist() == [[3, 3, 3, 3]]
    weight.data[1] = 5
    assert norm(x).tolist() == [[3, 5, 3, 3]]


@pytest.mark.parametrize("targets", [[1], [1, 2, 3]])
def test_a_row_is_copied_also_where_its_sequence_fills_the_cache_to_its_end(targets):
    cache = SlotCache([KVShape(num_heads=2, key_dim=16, value_dim=8)], 4, 64, torch.float32)
    cache.reserve(4, 64)
    for memory in (cache.keys[0], cache.values[0]):
        memory.copy_(torch.randn(memory.shape))
    source = cache.keys[0][0].clone(), cache.values[0][0].clone()
    cache.copy(0, targets, cache.length)
    for row in [0, *targets]:
        assert torch.equal(cache.keys[0][row], source[0])
        assert torch.equal(cache.values[0][row], source[1])
