"""How packed rows are divided between the attention kernels of a GPU; on one, tests/gpu checks the numbers."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slime.backends.megatron import gpu_attention
from slime.backends.megatron.gpu_attention import ATTENTIONS, Attention, Sequences, attention_named, pieces_of
from slime.backends.megatron.kernels import kernels_for

BY_LENGTH = next(iter(ATTENTIONS))


def _sequences(*lengths: int, keys: tuple[int, ...] | None = None) -> Sequences:
    """Sequences with as many keys as queries, or with the keys given."""
    keys = lengths if keys is None else keys
    boundaries = [torch.tensor([0, *numbers]).cumsum(0).int() for numbers in (lengths, keys)]
    return Sequences(boundaries[0], boundaries[1], lengths, keys)


@pytest.mark.parametrize(("flag", "name"), [("auto", BY_LENGTH), ("fused", BY_LENGTH), ("flash", "flash attention")])
def test_the_flag_chooses_and_the_log_names_it(flag: str, name: str) -> None:
    assert kernels_for(torch.device("cuda"), flag).name.startswith(f"attention by {name};")


def test_short_sequences_stay_together() -> None:
    (piece,) = pieces_of(_sequences(5, 4095, 7))
    assert (piece.rows, piece.keys, piece.padded) == (slice(0, 4107), slice(0, 4107), 0)


def test_each_long_sequence_is_a_piece_and_the_others_lie_between() -> None:
    pieces = pieces_of(_sequences(5, 7, 5000, 4096, 3, 2))
    rows = [slice(0, 12), slice(12, 5012), slice(5012, 9108), slice(9108, 9113)]
    assert [(piece.rows, piece.keys, piece.padded) for piece in pieces] == list(
        zip(rows, rows, (0, 5120, 4096, 0), strict=True)
    )
    boundaries = [piece.sequences.query_boundaries.tolist() for piece in pieces]
    assert boundaries == [[0, 5, 12], [0, 5000], [0, 4096], [0, 3, 5]]


def test_a_long_response_goes_alone_with_the_keys_of_its_prompt() -> None:
    """Prompt of 300, responses of 5000 and 10 that see it, a short sequence of its own."""
    pieces = pieces_of(_sequences(300, 5000, 10, 7, keys=(300, 5300, 310, 7)))
    rows = [slice(0, 300), slice(300, 5300), slice(5300, 5317)]
    keys = [slice(0, 300), slice(300, 5600), slice(5600, 5917)]
    assert [(piece.rows, piece.keys, piece.padded) for piece in pieces] == list(
        zip(rows, keys, (0, 5632, 0), strict=True)
    )
    assert pieces[2].sequences.key_boundaries.tolist() == [0, 310, 317]


def test_a_response_to_a_far_longer_prompt_stays_with_the_others() -> None:
    """Alone, its prompt's queries would be computed as well."""
    assert [piece.padded for piece in pieces_of(_sequences(4000, 4096, keys=(4000, 20000)))] == [0]


@pytest.mark.parametrize("length", [4096, 4097, 5000, 8191, 16384, 16385, 40000])
def test_few_sizes_are_asked_of_cudnn(length: int) -> None:
    padded = gpu_attention._rounded_up(length)
    assert length <= padded <= length * 9 / 8 and padded % 128 == 0
    octave = range(1 << (length.bit_length() - 1), 1 << length.bit_length())
    assert len({gpu_attention._rounded_up(each) for each in octave}) <= 9


def _plain(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float) -> Tensor:
    """The last query of each sequence stands at its last key."""
    parts = []
    lengths = (sequences.query_lengths, sequences.key_lengths, sequences.key_lengths)
    for tensors in zip(*(x.split(n) for x, n in zip((query, key, value), lengths, strict=True)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in tensors)
        queries, keys = q.size(2), k.size(2)
        sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """With 70 rows as long, and plain kernels in the place of both, which no CPU has; the sizes asked of cuDNN's."""
    monkeypatch.setattr(gpu_attention, "_LONG", 70)
    monkeypatch.setattr(gpu_attention, "_flash", _plain)
    sizes: list[tuple[int, ...]] = []

    def by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        sizes.append(tuple(query.shape))
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert all(x.stride(-1) == 1 and x.transpose(1, 2).is_contiguous() for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    monkeypatch.setattr(gpu_attention, "_by_cudnn", by_cudnn)
    return sizes


def _equals_plain(attend: Attention, sequences: Sequences) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys = sum(sequences.query_lengths), sum(sequences.key_lengths)
    inputs = [
        torch.randn(count, heads, 8, generator=generator).requires_grad_()
        for count, heads in ((rows, 4), (keys, 2), (keys, 2))
    ]
    ours, plain = attend(*inputs, sequences, 0.3), _plain(*inputs, sequences, 0.3)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ours.shape, generator=generator)
    for mine, theirs in zip(*(torch.autograd.grad(out, inputs, grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "sequences",
    [_sequences(5, 7, 100, 70, 3), _sequences(128), _sequences(9, 100, 3, 119, keys=(9, 109, 12, 128))],
    ids=["with others", "alone, nothing to pad", "with prompts before them"],
)
def test_the_pieces_give_what_each_sequence_gives_alone(asked: list[tuple[int, ...]], sequences: Sequences) -> None:
    _equals_plain(attention_named(BY_LENGTH), sequences)
    assert {size[2] for size in asked} == {128}


def test_a_size_is_tried_once_and_said_to_be_taken(
    asked: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """Backward of what is trained; a pass without gradients is another plan of cuDNN's."""
    attend, sequences = attention_named(BY_LENGTH), _sequences(100)
    inputs = [torch.randn(100, heads, 8) for heads in (4, 2, 2)]
    with caplog.at_level(logging.INFO):
        for needs_gradient in (False, True):
            for _ in range(3):
                attend(inputs[0].requires_grad_(needs_gradient), *inputs[1:], sequences, 0.3)
    assert len(asked) == 2 * (1 + 3)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "Attention over 128 rows: cuDNN, forward", "Attention over 128 rows: cuDNN, forward and backward",
    ]  # fmt: skip


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No valid execution plans built.")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_cudnn_refuses_is_said_and_done_by_flash_attention(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    calls = []

    def refuses(query: Tensor, *rest: object) -> Tensor:
        calls.append(query.size(2))
        if where == "backward":
            return _FailsBackward.apply(query)
        for words in ("Flash attention has been disabled.", "cuDNN SDPA is not deterministic. (Triggered internally)"):
            warnings.warn(words, stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(gpu_attention, "_by_cudnn", refuses)
    attend = attention_named(BY_LENGTH)
    for _ in range(2):
        _equals_plain(attend, _sequences(5, 100, 7, 300))
    assert calls == [128], "cuDNN is asked once"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    reason = {"forward": "cuDNN SDPA is not deterministic.", "backward": "No valid execution plans built."}[where]
    assert record.getMessage().endswith(f"{reason} Flash attention does instead.")
    assert "disabled" not in record.getMessage(), "only what is said of cuDNN"


def test_other_errors_of_a_device_are_not_taken_for_a_refusal(
    asked: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu_attention, "_by_cudnn", fails)
    with pytest.raises(torch.OutOfMemoryError):
        _equals_plain(attention_named(BY_LENGTH), _sequences(100))


def test_torch_refuses_cudnn_on_a_cpu_in_the_words_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sdpa, not a stand-in: its error is one of `_REFUSALS`."""
    monkeypatch.setattr(gpu_attention, "_LONG", 70)
    monkeypatch.setattr(gpu_attention, "_flash", _plain)
    _equals_plain(attention_named(BY_LENGTH), _sequences(100, 3))
