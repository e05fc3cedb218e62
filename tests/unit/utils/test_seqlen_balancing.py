"""Partitions and bins: every item exactly once, no bin over its cap, near-equal sums."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.utils.seqlen_balancing import (
    expand_bins_by_splitting,
    first_fit_pack,
    get_reverse_idx,
    get_seqlen_balanced_partitions,
    greedy_partition,
    karmarkar_karp,
)

LENGTHS = st.lists(st.integers(0, 1000), min_size=1, max_size=30)


def sums(lengths: list[int], partitions: list[list[int]]) -> list[int]:
    return [sum(lengths[i] for i in p) for p in partitions]


def items(partitions: list[list[int]]) -> list[int]:
    return sorted(itertools.chain(*partitions))


def test_the_differencing_method_on_its_textbook_example() -> None:
    """4, 5, 6, 7, 8 in two: the differences 8-7, 6-5, 4-1, 3-1 leave 2, so the sums are 14 and 16."""
    assert sorted(sums([4, 5, 6, 7, 8], karmarkar_karp([4, 5, 6, 7, 8], 2, equal_size=False))) == [14, 16]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.integers(1, 8), st.sampled_from([karmarkar_karp, greedy_partition]))
def test_every_item_is_in_exactly_one_partition(lengths: list[int], k: int, method) -> None:
    partitions = method(lengths, k, False)
    assert len(partitions) == k
    assert items(partitions) == list(range(len(lengths)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6), st.lists(st.integers(0, 1000), max_size=24))
def test_equal_size_gives_every_partition_as_many_items(first: list[int], more: list[int]) -> None:
    lengths = first + more[: len(more) // 6 * 6]
    for k in (1, 2, 3, 6):
        partitions = get_seqlen_balanced_partitions(lengths, k, equal_size=True)
        assert {len(p) for p in partitions} == {len(lengths) // k}
        assert items(partitions) == list(range(len(lengths)))
        assert all(p == sorted(p) for p in partitions)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=30), st.integers(2, 6))
def test_the_heaviest_partition_is_at_most_one_item_over_the_mean(lengths: list[int], k: int) -> None:
    if len(lengths) >= k:
        heaviest = max(sums(lengths, get_seqlen_balanced_partitions(lengths, k, equal_size=False)))
        assert heaviest <= sum(lengths) / k + max(lengths)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.integers(1, 30))
def test_no_partition_stays_empty(lengths: list[int], k: int) -> None:
    if len(lengths) >= k:
        assert all(get_seqlen_balanced_partitions(lengths, k, equal_size=False))


def test_differencing_beats_longest_first_on_a_known_case() -> None:
    lengths = [8, 7, 6, 5, 4]
    assert max(sums(lengths, greedy_partition(lengths, 2, False))) == 17
    assert max(sums(lengths, karmarkar_karp(lengths, 2, False))) == 16


def test_too_few_items_or_a_number_that_cannot_be_equal_is_refused() -> None:
    with pytest.raises(ValueError, match="2 items leave at least one of 3 partitions empty"):
        get_seqlen_balanced_partitions([1, 2], 3, equal_size=False)
    for method in (karmarkar_karp, greedy_partition):
        with pytest.raises(ValueError, match="3 items cannot be divided into 2 partitions of equal size"):
            method([1, 2, 3], 2, True)
    with pytest.raises(ValueError, match="into 0 partitions"):
        karmarkar_karp([1], 0, False)


def test_first_fit_by_hand() -> None:
    """Cap 10: 6 | 5 | 4 joins the 6 | 11 is alone | 5 joins the other 5."""
    assert first_fit_pack([6, 5, 4, 11, 5], 10) == [[0, 2], [1, 4], [3]]


def test_a_sample_goes_where_its_prompt_already_is() -> None:
    """Prompts of 6, responses of 1, cap 8: without sharing every sample is alone, with it two fit to one prompt."""
    assert first_fit_pack([7, 7, 7, 7], 8) == [[0], [1], [2], [3]]
    shared = first_fit_pack([7, 7, 7, 7], 8, shared_keys=[0, 1, 0, 0], shared_lengths=[6] * 4)
    assert shared == [[0, 2], [1], [3]]
    with pytest.raises(ValueError, match="belong together"):
        first_fit_pack([7], 8, shared_keys=[0])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 3)), max_size=25), st.integers(1, 60))
def test_bins_hold_at_most_the_cap_unless_one_item_exceeds_it(samples, cap: int) -> None:
    prompts = {key: max((p for p, _, k in samples if k == key), default=0) for key in range(4)}
    keys = [key for _, _, key in samples]
    shared = [prompts[key] for key in keys]
    lengths = [prompts[key] + response for _, response, key in samples]
    bins = first_fit_pack(lengths, cap, shared_keys=keys, shared_lengths=shared)
    assert items(bins) == list(range(len(samples)))
    for members in bins:
        held = sum(lengths[i] - shared[i] for i in members) + sum(prompts[key] for key in {keys[i] for i in members})
        assert held <= cap or (lengths[members[0]] > cap and all(lengths[i] == 0 for i in members[1:]))


def test_the_heaviest_bin_is_halved() -> None:
    """9+5+4 is the heaviest: 9 | 5+4."""
    assert expand_bins_by_splitting([[0, 1], [2, 3, 4]], [3, 3, 9, 5, 4], 3) == [[0, 1], [2], [3, 4]]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 20))
def test_splitting_keeps_every_item_and_empties_no_bin(lengths: list[int], num_bins: int) -> None:
    if num_bins <= len(lengths):
        bins = expand_bins_by_splitting([list(range(len(lengths)))], lengths, num_bins)
        assert len(bins) == num_bins
        assert all(bins)
        assert items(bins) == list(range(len(lengths)))


def test_items_of_one_key_stay_together_while_they_can() -> None:
    halves = expand_bins_by_splitting([[0, 1, 2, 3]], [5, 5, 5, 5], 2, shared_keys=[0, 1, 0, 1])
    assert halves == [[0, 2], [1, 3]]
    assert expand_bins_by_splitting([[0, 1]], [5, 5], 2, shared_keys=[0, 0]) == [[0], [1]]


def test_more_bins_than_items_is_refused() -> None:
    with pytest.raises(ValueError, match="2 items cannot fill 3 bins"):
        expand_bins_by_splitting([[0, 1]], [1, 1], 3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(list(range(8))))
def test_the_reverse_index_undoes_a_permutation(order: list[int]) -> None:
    values = [f"v{i}" for i in range(8)]
    moved = [values[i] for i in order]
    assert [moved[i] for i in get_reverse_idx(order)] == values
