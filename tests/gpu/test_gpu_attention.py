"""Attention kernels of a GPU on packed rows with and without shared prompts equal those of the CPU."""

import logging

import pytest
import torch
from torch import Tensor

from slime.backends.megatron import cpu_attention, gpu_attention, kernels
from slime.backends.megatron.gpu_attention import attention_named
from slime.backends.megatron.packed import packed_segments
from slime.data.packing import PackedBatch, pack

pytestmark = pytest.mark.gpu

HEADS, GROUPS, DIM = 4, 2, 64


def _row(share_prompts: bool) -> PackedBatch:
    """Two groups: three responses of a prompt of 100, two of a prompt of 7; one is longer than any prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 9, (length,), generator=generator) for length in (100, 7)]
    lengths, groups = [5, 300, 64, 1, 33], [0, 0, 0, 1, 1]
    tokens = [
        torch.cat([prompts[group], torch.randint(1, 9, (length,), generator=generator)])
        for group, length in zip(groups, lengths, strict=True)
    ]
    return pack(tokens, lengths, groups, share_prompts=share_prompts, multiple_of=128)


@pytest.mark.parametrize("share_prompts", [True, False], ids=["shared prompts", "whole sequences"])
@pytest.mark.parametrize("name", kernels.ATTENTION_NAMES)
def test_attention_and_its_gradients(name: str, share_prompts: bool) -> None:
    attend = attention_named(name)
    batch = _row(share_prompts)
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(batch.num_tokens, heads, DIM, generator=generator).bfloat16()
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]
    device = torch.device("cuda", 0)
    plain = [x.float().requires_grad_() for x in drawn[:3]]
    expected = cpu_attention.attend(*plain, cpu_attention.attention_blocks(batch.segments, torch.float32), DIM**-0.5)
    expected_gradients = torch.autograd.grad(expected, plain, drawn[3].float())

    packed = packed_segments(batch.to(device), torch.ones(DIM // 2, device=device), torch.float32)
    inputs = [x.to(device).requires_grad_() for x in drawn[:3]]
    query, key, value = inputs
    taken = kernels.kernels_for(device).take_rows
    if packed.taken_keys is not None:
        key, value = (taken(x, *packed.taken_keys) for x in (key, value))
    assert packed.sequences is not None
    out = attend(query, key, value, packed.sequences, DIM**-0.5)
    gradients = torch.autograd.grad(out, inputs, drawn[3].to(device))
    for mine, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert _relative_error(mine, theirs) < 0.01


@pytest.mark.parametrize("share_prompts", [True, False], ids=["with their prompts", "whole"])
def test_sequences_that_go_alone_are_computed_by_cudnn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share_prompts: bool
) -> None:
    """The longest of the row, of a length that needs padding, and the others together, as in a row of long ones."""
    monkeypatch.setattr(gpu_attention, "_LONG", 100)
    with caplog.at_level(logging.INFO):
        test_attention_and_its_gradients(kernels.ATTENTION_NAMES[0], share_prompts)
    said = [record.getMessage() for record in caplog.records if record.name == gpu_attention.__name__]
    assert said and all("cuDNN, forward and backward" in message for message in said), said


@pytest.mark.parametrize("length", [4096, 5000, 16384])
def test_cudnn_and_flash_attention_agree_on_long_sequences(length: int) -> None:
    """Values as Megatron passes them: a slice of the product that also gives queries and keys."""
    device = torch.device("cuda", 0)
    generator = torch.Generator(device).manual_seed(0)
    whole = torch.randn(length, GROUPS, (HEADS // GROUPS + 2) * DIM, device=device, generator=generator).bfloat16()
    query, key, value = whole.split([HEADS // GROUPS * DIM, DIM, DIM], -1)
    inputs = [query.reshape(length, HEADS, DIM).requires_grad_(), key.contiguous().requires_grad_(), value]
    inputs[2].requires_grad_()
    grad = torch.randn(length, HEADS, DIM, device=device, generator=generator).bfloat16()
    boundaries = torch.tensor([0, length], dtype=torch.int32, device=device)
    sequences = gpu_attention.Sequences(boundaries, boundaries, (length,), (length,))
    results = []
    for name in kernels.ATTENTION_NAMES:
        out = attention_named(name)(*inputs, sequences, DIM**-0.5)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for mine, theirs in zip(*results, strict=True):
        assert _relative_error(mine, theirs.detach().float().cpu()) < 0.01


def _relative_error(mine: Tensor, theirs: Tensor) -> float:
    difference = mine.detach().float().cpu() - theirs.detach()
    return float(difference.norm() / theirs.detach().norm())
