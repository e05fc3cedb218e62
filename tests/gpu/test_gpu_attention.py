"""Attention kernels of a GPU on packed rows with and without shared prompts equal those of the CPU."""

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
    try:
        attend = attention_named(name)
    except ImportError as error:
        pytest.skip(str(error))
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


def test_sequences_that_go_alone_are_computed_by_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest of the row, of a length that needs padding, and the others together, as in a row of long ones."""
    monkeypatch.setattr(gpu_attention, "_LONG", 100)
    test_attention_and_its_gradients("torch by length", share_prompts=False)


def _relative_error(mine: Tensor, theirs: Tensor) -> float:
    difference = mine.detach().float().cpu() - theirs.detach()
    return float(difference.norm() / theirs.detach().norm())
