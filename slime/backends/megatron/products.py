"""Matrix products of the linear layers.

torch gives float32 products on a CPU to MKL, which on AMD processors reaches half the speed of oneDNN (measured on one
core: 97 against 206 GFLOP/s); bfloat16 goes to oneDNN anyway. So float32 is sent to oneDNN here, by the operator that
torch's own compiler uses. Same arithmetic: float32 throughout.
"""

import functools
import platform
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _has_onednn_linear() -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] times weight [n, k] transposed: [..., n]. No gradient is recorded through oneDNN: see `linear`."""
    if x.dtype is torch.float32 and x.device.type == "cpu" and x.numel() and _has_onednn_linear():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.t()


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """`product` of two-dimensional x, written to `out` [m, n]."""
    if x.dtype is torch.float32:
        out.copy_(product(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, product(grad.flatten(0, -2).t(), x.flatten(0, -2).t())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., k] times weight [n, k] transposed, with gradients."""
    return _Linear.apply(x, weight)
