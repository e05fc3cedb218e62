"""Rotary positions and SwiGLU with backwards of their own equal autograd through the plain expressions."""

import pytest
import torch
import torch.nn.functional as F

from slime.backends.megatron.pointwise import rms_norm, rotate, swiglu


@pytest.mark.parametrize("rotated", [8, 4], ids=["whole head", "half of the head"])
def test_rotation_and_its_gradient(rotated: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 1, rotated // 2, generator=generator, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    plain = torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotated:]], -1)
    ours = rotate(x, cos, sin)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, plain)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 12, generator=generator).to(dtype).requires_grad_()
    gate, up = x.chunk(2, -1)
    plain, ours = F.silu(gate) * up, swiglu(x)
    assert torch.equal(ours, plain)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (ours, plain)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_and_its_gradients_are_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(7, 2, 24, generator=generator) * 3).to(dtype).requires_grad_()
    weight = torch.randn(24, generator=generator).to(dtype).requires_grad_()
    plain, ours = F.rms_norm(x, (24,), weight, 1e-5), rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, weight), grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
