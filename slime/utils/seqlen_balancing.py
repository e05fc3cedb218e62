"""Divides samples of different lengths into equally heavy partitions, or into bins that hold at most so many tokens."""

import heapq
from collections.abc import Callable, Sequence

Weigh = Callable[[Sequence[int]], float]


def karmarkar_karp(seqlen_list: Sequence[float], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Largest differencing method: k partitions of positions whose sums are nearly equal.

    Source: N. Karmarkar, R. Karp, "The Differencing Method of Set Partitioning" (UCB/CSD 82/113, 1982). Every candidate
    is a division of some items into k sets; the two with the largest spread are joined, heaviest set to lightest.

    Args:
        seqlen_list: weights, at least 0.
        k_partitions: k, at least 1.
        equal_size: all partitions get the same number of items; k must then divide their number.
    """
    if k_partitions < 1:
        raise ValueError(f"Items cannot be divided into {k_partitions} partitions.")
    if equal_size and len(seqlen_list) % k_partitions != 0:
        raise ValueError(f"{len(seqlen_list)} items cannot be divided into {k_partitions} partitions of equal size.")
    order = sorted(range(len(seqlen_list)), key=lambda i: (seqlen_list[i], i))
    items_per_start = k_partitions if equal_size else 1
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for number, start in enumerate(range(0, len(order), items_per_start)):
        items = order[start : start + items_per_start]
        sets = [(seqlen_list[i], [i]) for i in items] + [(0, []) for _ in range(k_partitions - len(items))]
        heap.append(_candidate(sets, number))
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, heaviest_first = heapq.heappop(heap)
        _, _, other = heapq.heappop(heap)
        joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(heaviest_first, reversed(other), strict=True)]
        heapq.heappush(heap, _candidate(joined, number))
        number += 1
    return [items for _, items in heap[0][2]] if heap else [[] for _ in range(k_partitions)]


def _candidate(sets: list[tuple[float, list[int]]], number: int) -> tuple[float, int, list[tuple[float, list[int]]]]:
    """Heap entry, largest spread first; `number` settles ties the same way everywhere."""
    sets = sorted(sets, key=lambda s: (-s[0], -len(s[1])))
    return -(sets[0][0] - sets[-1][0]), number, sets


def greedy_partition(seqlen_list: Sequence[float], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """Longest item first, each to the lightest partition (that still has room, with `equal_size`)."""
    if equal_size and len(seqlen_list) % k_partitions != 0:
        raise ValueError(f"{len(seqlen_list)} items cannot be divided into {k_partitions} partitions of equal size.")
    room = len(seqlen_list) // k_partitions if equal_size else len(seqlen_list)
    partitions: list[list[int]] = [[] for _ in range(k_partitions)]
    sums = [0.0] * k_partitions
    for i in sorted(range(len(seqlen_list)), key=lambda i: (-seqlen_list[i], i)):
        p = min((p for p in range(k_partitions) if len(partitions[p]) < room), key=lambda p: (sums[p], p))
        partitions[p].append(i)
        sums[p] += seqlen_list[i]
    return partitions


def get_seqlen_balanced_partitions(
    seqlen_list: Sequence[float], k_partitions: int, equal_size: bool
) -> list[list[int]]:
    """Karmarkar-Karp partitions, each in ascending order of positions; every position is in exactly one.

    Raises:
        ValueError: fewer items than partitions, or a number of items that `equal_size` cannot divide.
    """
    if len(seqlen_list) < k_partitions:
        raise ValueError(f"{len(seqlen_list)} items leave at least one of {k_partitions} partitions empty.")
    partitions = [sorted(p) for p in karmarkar_karp(seqlen_list, k_partitions, equal_size)]
    assert all(partitions), f"an empty partition among {partitions}"
    assert sorted(i for p in partitions for i in p) == list(range(len(seqlen_list)))
    return partitions


def first_fit_pack(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    shared_keys: Sequence[int] | None = None,
    shared_lengths: Sequence[int] | None = None,
) -> list[list[int]]:
    """Bins of positions in order of arrival: each item goes into the first bin where it fits; a longer one is alone.

    Args:
        lengths: tokens of each item.
        max_tokens: that a bin may hold.
        shared_keys: items with the same key share part of their tokens, which a bin counts once; such an item goes to
            the first bin that already holds its key and has room, before any other.
        shared_lengths: how many of `lengths` are that part; an item with 0 brings nothing that others could share.
    """
    if (shared_keys is None) != (shared_lengths is None):
        raise ValueError("shared_keys and shared_lengths belong together: pass both or neither.")
    bins: list[list[int]] = []
    sizes: list[int] = []
    keys_of: list[set[int]] = []
    for i, length in enumerate(lengths):
        target: int | None = None
        added = length
        if shared_keys is not None and shared_lengths is not None:
            alone = length - shared_lengths[i]
            holders = (b for b in range(len(bins)) if shared_keys[i] in keys_of[b] and sizes[b] + alone <= max_tokens)
            target = next(holders, None)
            if target is not None:
                added = alone
        if target is None:
            target = next((b for b in range(len(bins)) if sizes[b] + length <= max_tokens), None)
        if target is None:
            bins.append([])
            sizes.append(0)
            keys_of.append(set())
            target = len(bins) - 1
        bins[target].append(i)
        sizes[target] += added
        if shared_keys is not None and shared_lengths is not None and shared_lengths[i] > 0:
            keys_of[target].add(shared_keys[i])
    return bins


def expand_bins_by_splitting(
    bins: Sequence[Sequence[int]],
    lengths: Sequence[int],
    num_bins: int,
    *,
    weigh: Weigh | None = None,
    shared_keys: Sequence[int] | None = None,
) -> list[list[int]]:
    """Halve the heaviest bin of several items until there are `num_bins`; halves hold no more than the whole did.

    A bin is halved by its items, heaviest first, each to the lighter half. Items with the same key stay together as
    long as there is more than one key in the bin.

    Args:
        bins: positions.
        lengths: tokens of each item.
        num_bins: wanted; at least `len(bins)`.
        weigh: tokens of a set of items; None: the sum of their lengths.
        shared_keys: which items should stay together.

    Raises:
        ValueError: fewer items than `num_bins`.
    """
    weigh = weigh or (lambda items: sum(lengths[i] for i in items))
    result = [list(b) for b in bins]
    num_items = sum(len(b) for b in result)
    if num_items < num_bins:
        raise ValueError(f"{num_items} items cannot fill {num_bins} bins.")
    while len(result) < num_bins:
        heaviest = max((b for b in range(len(result)) if len(result[b]) > 1), key=lambda b: (weigh(result[b]), -b))
        result[heaviest : heaviest + 1] = _halve(result[heaviest], weigh, shared_keys)
    return result


def _halve(items: Sequence[int], weigh: Weigh, shared_keys: Sequence[int] | None) -> list[list[int]]:
    units: dict[int, list[int]] = {}
    for i in items:
        units.setdefault(i if shared_keys is None else shared_keys[i], []).append(i)
    if len(units) == 1:
        units = {i: [i] for i in items}
    halves: list[list[int]] = [[], []]
    sums = [0.0, 0.0]
    for unit in sorted(units.values(), key=lambda unit: (-weigh(unit), unit)):
        half = min((0, 1), key=lambda h: (sums[h], len(halves[h])))
        halves[half] += unit
        sums[half] += weigh(unit)
    return [sorted(half) for half in halves]


def get_reverse_idx(idx_map: Sequence[int]) -> list[int]:
    """The inverse of a permutation: `reverse[idx_map[i]] == i`."""
    reverse = [0] * len(idx_map)
    for i, position in enumerate(idx_map):
        reverse[position] = i
    return reverse
