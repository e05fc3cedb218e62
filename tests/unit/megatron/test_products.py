"""Linear layers through oneDNN are linear layers."""

import pytest
import torch
import torch.nn.functional as F

from slime.backends.megatron.products import linear, product_into


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_products_and_gradients_are_torchs(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(17, 24, generator=generator).to(dtype).requires_grad_()
    ours, plain = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(ours, plain)
    grad = torch.randn(ours.shape, generator=generator).to(dtype)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, weight), grad) for out in (ours, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
    out = torch.empty(rows, 17, dtype=dtype)
    product_into(out, x.detach()[:, 0], weight.detach())
    torch.testing.assert_close(out, plain.detach()[:, 0])


def test_a_frozen_weight_costs_no_gradient() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 4))
    assert weight.grad is None
