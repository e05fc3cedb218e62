"""The small pieces between matrix products, each with a backward of its own: on a CPU the memory traffic of a dozen
autograd nodes costs more than the arithmetic.

Numbers are those of the plain expression, in the same order of roundings that transformers uses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Rotate(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin over the first d dimensions; its transpose turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.size(-1)
    first, second = x[..., :half], x[..., half : 2 * half]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.sub(first * cos, second * sin, out=out[..., :half])
    torch.add(second * cos, first * sin, out=out[..., half : 2 * half])
    if 2 * half < x.size(-1):
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout of llama.

    Args:
        x: [T, heads, head_dim].
        cos, sin: [T, 1, d/2] with d <= head_dim; dimensions from d on pass unchanged.
    """
    return _Rotate.apply(x, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202) of x = [gate, up] along the last axis: [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x * scale, weight, out=torch.empty_like(x, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = grad.float() * weight
        along = torch.linalg.vecdot(grad_normed, normed).div_(x.size(-1)).unsqueeze(-1)
        return grad_normed.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467) over the last axis, in float32 and rounded once."""
    return _RMSNorm.apply(x, weight, eps)


def take_rows(x: Tensor, index: Tensor, starts: Tensor, places: Tensor) -> Tensor:
    """x[index]. (`starts` and `places` are the index turned round, for the kernel of triton_kernels.py.)"""
    return x.index_select(0, index)
