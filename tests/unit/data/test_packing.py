"""Every response token must see exactly its own sequence, whatever is shared, padded or empty."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slime.data.packing import (
    PackedBatch,
    Segment,
    concat_responses,
    num_packed_tokens,
    pack,
    prompt_keys,
    split_by_sample,
)


def visible_tokens(batch: PackedBatch, row: int) -> list[tuple[int, int]]:
    """(position, token) of all rows that `row` attends to, by the meaning of the segments."""
    segment = next(s for s in batch.segments if s.q_start <= row < s.q_start + s.q_len)
    rows = [*range(segment.prefix_start, segment.prefix_start + segment.prefix_len), *range(segment.q_start, row + 1)]
    return [(int(batch.position_ids[r]), int(batch.input_ids[r])) for r in rows]


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[torch.Tensor], list[int], list[int | None]]:
    """A few samples whose prompts often coincide, in any order, with empty responses among them."""
    tokens, lengths, groups = [], [], []
    for _ in range(draw(st.integers(0, 6))):
        group = draw(st.sampled_from([None, 0, 1]))
        prompt = draw(st.sampled_from([[5], [5, 6, 7], [8, 6]]))
        response = draw(st.lists(st.integers(10, 19), max_size=4))
        tokens.append(torch.tensor(prompt + response))
        lengths.append(len(response))
        groups.append(group)
    return tokens, lengths, groups


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples(), st.booleans(), st.integers(1, 9))
def test_each_response_token_is_predicted_from_its_own_sequence(data, share_prompts: bool, multiple_of: int) -> None:
    tokens, lengths, groups = data
    batch = pack(tokens, lengths, groups, share_prompts=share_prompts, multiple_of=multiple_of)
    n = 0
    for ids, num_response in zip(tokens, lengths, strict=True):
        for t in range(ids.numel() - num_response, ids.numel()):
            assert visible_tokens(batch, int(batch.head_index[n])) == list(enumerate(ids[:t].tolist()))
            assert batch.targets[n] == ids[t]
            n += 1
    assert n == batch.num_response_tokens == sum(lengths)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples(), st.booleans(), st.integers(1, 9))
def test_segments_cover_the_row_and_prefixes_lie_before_their_responses(data, share_prompts, multiple_of) -> None:
    tokens, lengths, groups = data
    batch = pack(tokens, lengths, groups, share_prompts=share_prompts, multiple_of=multiple_of)
    assert batch.num_tokens % multiple_of == 0
    assert batch.position_ids.shape == batch.input_ids.shape
    next_row = 0
    for segment in batch.segments:
        assert segment.q_start == next_row
        assert segment.q_len > 0
        assert segment.prefix_start + segment.prefix_len <= segment.q_start
        assert segment.prefix_len == 0 or any(
            (s.q_start, s.q_len) == (segment.prefix_start, segment.prefix_len) for s in batch.segments
        )
        next_row += segment.q_len
    assert next_row == batch.num_tokens == batch.cu_seqlens[-1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples(), st.booleans())
def test_the_predicted_cost_of_a_row_is_its_length_without_padding(data, share_prompts: bool) -> None:
    tokens, lengths, groups = data
    batch = pack(tokens, lengths, groups, share_prompts=share_prompts, multiple_of=8)
    keys = prompt_keys(tokens, lengths, groups) if share_prompts else None
    assert num_packed_tokens([t.numel() for t in tokens], lengths, keys) == batch.num_tokens - batch.num_padding


def test_the_picture_of_the_module_is_true() -> None:
    p, q, r, s, a1, a2, b1, b2, b3, c1 = range(1, 11)
    tokens = [torch.tensor(t) for t in ([p, q, r, a1, a2], [p, q, r, b1, b2, b3], [s, c1])]
    plain = pack(tokens, [2, 3, 1], [0, 0, 1], share_prompts=False, multiple_of=2)
    assert plain.input_ids.tolist() == [p, q, r, a1, a2, p, q, r, b1, b2, b3, s, c1, 0]
    assert plain.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 0, 1, 0]
    assert plain.cu_seqlens == [0, 5, 11, 13, 14]
    assert plain.num_padding == 1
    assert not plain.has_shared_prompts

    shared = pack(tokens, [2, 3, 1], [0, 0, 1], share_prompts=True, multiple_of=2)
    assert shared.input_ids.tolist() == [p, q, r, a1, b1, b2, s, 0]
    assert shared.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 0, 0]
    assert shared.segments == (Segment(0, 3), Segment(3, 1, 0, 3), Segment(4, 2, 0, 3), Segment(6, 1), Segment(7, 1))
    assert shared.head_index.tolist() == [2, 3, 2, 4, 5, 6]
    assert shared.targets.tolist() == [a1, a2, b1, b2, b3, c1]
    assert shared.has_shared_prompts


def test_equal_prompts_of_different_groups_or_different_prompts_of_one_group_stay_apart() -> None:
    tokens = [torch.tensor(t) for t in ([1, 2, 3], [1, 2, 4], [9, 2, 3], [1, 2, 5])]
    assert prompt_keys(tokens, [1] * 4, [0, 1, 0, 0]) == [0, 1, 2, 0]
    assert prompt_keys(tokens, [1] * 4, [None] * 4) == [0, 1, 2, 3]
    assert prompt_keys(tokens, [1] * 4, None) == [0, 1, 2, 3]


def test_a_batch_without_any_response_is_padding_only() -> None:
    batch = pack([torch.tensor([1, 2])], [0], [0], share_prompts=True, multiple_of=4)
    assert batch.input_ids.tolist() == [0, 0, 0, 0]
    assert batch.num_padding == 4
    assert batch.head_index.numel() == batch.targets.numel() == 0


def test_a_response_without_a_prompt_is_refused_with_its_sample() -> None:
    with pytest.raises(ValueError, match=r"Sample 1: a response of 2 tokens in a sequence of 2"):
        pack([torch.tensor([1, 2]), torch.tensor([3, 4])], [1, 2], None, share_prompts=False)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 token sequences but 1 response lengths"):
        pack([torch.tensor([1, 2])] * 2, [1], None, share_prompts=False)
    with pytest.raises(ValueError, match="1 token sequences but 2 group indices"):
        pack([torch.tensor([1, 2])], [1], [0, 0], share_prompts=True)
    with pytest.raises(ValueError, match="one-dimensional"):
        pack([torch.tensor([[1, 2]])], [1], None, share_prompts=False)
    with pytest.raises(ValueError, match="multiple of 0"):
        pack([torch.tensor([1, 2])], [1], None, share_prompts=False, multiple_of=0)


def test_the_flat_axis_splits_into_samples_and_back() -> None:
    batch = pack(
        [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6])], [2, 0, 1], None, share_prompts=False
    )
    parts = split_by_sample(batch.targets, batch.response_lengths)
    assert [part.tolist() for part in parts] == [[2, 3], [], [6]]
    assert [batch.targets[s].tolist() for s in batch.response_slices] == [[2, 3], [], [6]]
    assert concat_responses(parts, batch.response_lengths).tolist() == [2, 3, 6]
    with pytest.raises(ValueError, match="3 rows cannot be split into responses of 4"):
        split_by_sample(batch.targets, [2, 2])
    with pytest.raises(ValueError, match=r"\[2, 0, 1\] do not fit responses of lengths \[2, 1, 0\]"):
        concat_responses(parts, [2, 1, 0])
