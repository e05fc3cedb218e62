"""The small pieces between matrix products as Triton kernels: one pass over memory each, forward and backward.

Letters: R rows, n columns, T rows of a packed micro-batch, H heads of d dimensions, f features of an MLP, V rows of the
vocabulary on this rank, C rows of a chunk of logits.

Everything is computed in float32 and rounded once, at the end, as SGLang's CUDA kernels do. Sums over rows are made in
a fixed order, so that the same numbers give the same bits. `pointwise.py` is the same in torch.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Numbers that a program holds at once."""
_PROGRAMS = 512
"""Programs that share the rows of a sum over rows: a few a multiprocessor."""


def _rows_of(x: Tensor) -> Tensor:
    """[..., n] as [R, n] with unit stride along n; a view if its rows are equally far apart."""
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tile_rows(columns: int) -> int:
    return max(1, min(16, _TILE // columns))


# --- RMSNorm ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rms_norm_forward(
    x, weight, out, scale, rows, columns, x_stride, eps, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)
    in_row = row < rows
    inside = in_row[:, None] & (column < columns)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], inside, 0.0).to(tl.float32)
    by = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    w = tl.load(weight + column, column < columns, 0.0).to(tl.float32)
    result = values * by[:, None] * w[None, :]
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], result.to(out.dtype.element_ty), inside)
    tl.store(scale + row, by, in_row)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, scale, grad_x, grad_weights, rows, columns, grad_stride, x_stride,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    in_columns = column < columns
    w = tl.load(weight + column, in_columns, 0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    tiles = tl.cdiv(rows, TILE_ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
        inside = (row < rows)[:, None] & in_columns[None, :]
        at = row.to(tl.int64)[:, None]
        g = tl.load(grad + at * grad_stride + column[None, :], inside, 0.0).to(tl.float32)
        values = tl.load(x + at * x_stride + column[None, :], inside, 0.0).to(tl.float32)
        by = tl.load(scale + row, row < rows, 0.0)[:, None]
        normed = values * by
        total += tl.sum(g * normed, 0)
        grad_normed = g * w[None, :]
        along = tl.sum(grad_normed * normed, 1)[:, None] / columns
        result = (grad_normed - normed * along) * by
        tl.store(grad_x + at * columns + column[None, :], result.to(grad_x.dtype.element_ty), inside)
    tl.store(grad_weights + tl.program_id(0) * columns + column, total, in_columns)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = _rows_of(x)
        count, columns = rows.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(columns)
        tile = _tile_rows(block)
        if count:
            _rms_norm_forward[(triton.cdiv(count, tile),)](
                rows, weight, out, scale, count, columns, rows.stride(0), eps, TILE_ROWS=tile, BLOCK=block
            )
        ctx.save_for_backward(rows, weight, scale)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, scale = ctx.saved_tensors
        count, columns = rows.shape
        grad_rows = _rows_of(grad)
        grad_x = torch.empty(ctx.shape, dtype=rows.dtype, device=rows.device)
        block = triton.next_power_of_2(columns)
        tile = _tile_rows(block)
        programs = max(1, min(_PROGRAMS, triton.cdiv(count, tile)))
        grad_weights = torch.empty(programs, columns, dtype=torch.float32, device=rows.device)
        _rms_norm_backward[(programs,)](
            grad_rows, rows, weight, scale, grad_x, grad_weights, count, columns, grad_rows.stride(0), rows.stride(0),
            TILE_ROWS=tile, BLOCK=block,
        )  # fmt: skip
        return grad_x, grad_weights.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467) over the last axis."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


# --- rotary positions ------------------------------------------------------------------------------------------------


@triton.jit
def _rotate_rows(x, cos, sin, out, heads, dim, half, x_row, x_head, sign, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    column = tl.arange(0, BLOCK)
    inside = (head < heads)[:, None] & (column < dim)[None, :]
    is_first = column < half
    is_turned = column < 2 * half
    angle = tl.where(is_first, column, column - half)
    c = tl.load(cos + row * half + angle, is_turned, 1.0).to(tl.float32)
    s = tl.load(sin + row * half + angle, is_turned, 0.0).to(tl.float32) * sign
    s = tl.where(is_first, -s, s)
    partner = tl.where(is_first, column + half, tl.where(is_turned, column - half, column))
    start = x + row * x_row + head[:, None] * x_head
    values = tl.load(start + column[None, :], inside, 0.0).to(tl.float32)
    partners = tl.load(start + partner[None, :], inside, 0.0).to(tl.float32)
    result = values * c[None, :] + partners * s[None, :]
    place = out + (row * heads + head[:, None]) * dim + column[None, :]
    tl.store(place, result.to(out.dtype.element_ty), inside)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _rotate_rows[(rows,)](
            x, cos, sin, out, heads, dim, cos.size(-1), x.stride(0), x.stride(1), sign,
            HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(dim),
        )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) in the half-split layout of llama.

    Args:
        x: [T, H, d].
        cos, sin: [T, 1, d'/2], contiguous, with d' <= d; dimensions from d' on pass unchanged.
    """
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


# --- SwiGLU ----------------------------------------------------------------------------------------------------------


@triton.jit
def _swiglu_forward(x, out, features, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + features + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * features + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), inside)


@triton.jit
def _swiglu_backward(grad, x, grad_x, features, grad_stride, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    g = tl.load(grad + row * grad_stride + column, inside, 0.0).to(tl.float32)
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + features + column, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = grad_x.dtype.element_ty
    tl.store(grad_x + row * 2 * features + column, (g * up * (sigmoid + silu * (1 - sigmoid))).to(kind), inside)
    tl.store(grad_x + row * 2 * features + features + column, (g * silu).to(kind), inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = _rows_of(x)
        features = rows.size(1) // 2
        out = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
        if out.numel():
            block = min(2048, triton.next_power_of_2(features))
            grid = (rows.size(0), triton.cdiv(features, block))
            _swiglu_forward[grid](rows, out, features, rows.stride(0), BLOCK=block)
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        features = rows.size(1) // 2
        grad_rows = _rows_of(grad)
        grad_x = torch.empty(ctx.shape, dtype=rows.dtype, device=rows.device)
        if grad_x.numel():
            block = min(2048, triton.next_power_of_2(features))
            grid = (rows.size(0), triton.cdiv(features, block))
            _swiglu_backward[grid](grad_rows, rows, grad_x, features, grad_rows.stride(0), rows.stride(0), BLOCK=block)
        return grad_x


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202) of x = [gate, up] along the last axis: [..., 2 f] -> [..., f]."""
    out: Tensor = _SwiGLU.apply(x)
    return out


# --- rows taken several times --------------------------------------------------------------------------------------


@triton.jit
def _sum_of_places(grad, starts, places, out, columns, grad_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(starts + row), tl.load(starts + row + 1)):
        at = tl.load(places + i).to(tl.int64)
        total += tl.load(grad + at * grad_stride + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), inside)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, starts: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(starts, places)
        ctx.shape = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        starts, places = ctx.saved_tensors
        grad = grad.contiguous()
        out = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)
        columns = out[0].numel()
        _sum_of_places[(out.size(0),)](
            grad, starts, places, out, columns, columns, BLOCK=triton.next_power_of_2(columns)
        )
        return out, None, None, None


def take_rows(x: Tensor, index: Tensor, starts: Tensor, places: Tensor) -> Tensor:
    """x[index], where a row may be taken several times; its gradients are summed in float32, in order.

    Args:
        x: [T, G, d].
        index: [S] rows of x.
        starts: [T + 1] int32, and places: [S] int32: index[places[starts[t]:starts[t + 1]]] are all equal to t.
    """
    out: Tensor = _TakeRows.apply(x, index, starts, places)
    return out


# --- the head --------------------------------------------------------------------------------------------------------


@triton.jit
def _logit_stats(
    logits, targets, log_sums, target_logits, mean_logits, columns, stride, inverse_temperature, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    top = -float("inf")
    mass = 0.0
    weighted = 0.0  # sum of exp(logit - top) * (logit - top)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < columns
        values = tl.load(start + column, inside, -float("inf")).to(tl.float32) * inverse_temperature
        new_top = tl.maximum(top, tl.max(values, 0))
        shrink = tl.exp(top - new_top)
        # exp(top - new_top) * (sum of e^(l - top) (l - top)), moved to the new top; nothing before the first block
        weighted = tl.where(mass > 0, (weighted + mass * (top - new_top)) * shrink, 0.0)
        shifted = values - new_top
        exponentials = tl.exp(shifted)
        mass = mass * shrink + tl.sum(exponentials, 0)
        weighted += tl.sum(tl.where(inside, exponentials * shifted, 0.0), 0)
        top = new_top
    tl.store(log_sums + row, tl.log(mass) + top)
    tl.store(mean_logits + row, weighted / mass + top)
    target = tl.load(targets + row)
    tl.store(target_logits + row, tl.load(start + target).to(tl.float32) * inverse_temperature)


def logit_stats(logits: Tensor, targets: Tensor, stats: Tensor, temperature: float) -> None:
    """Fill `stats` [3, C]: logarithm of the sum of exponentials, the target's logit, the mean under the softmax.

    Args:
        logits: [C, V], before the division by the temperature.
        targets: [C] columns.
        stats: float32; each of its rows contiguous.
    """
    if logits.size(0):
        _logit_stats[(logits.size(0),)](
            logits, targets, stats[0], stats[1], stats[2], logits.size(1), logits.stride(0), 1.0 / temperature,
            BLOCK=min(8192, triton.next_power_of_2(logits.size(1))), num_warps=8,
        )  # fmt: skip


@triton.jit
def _logits_to_gradients(
    logits, targets, is_here, log_sums, mean_logits, at_target, grad, grad_entropy, columns, stride,
    inverse_temperature, WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    start = logits + row * stride
    values = tl.load(start + column, inside, 0.0).to(tl.float32) * inverse_temperature
    p = tl.exp(values - tl.load(log_sums + row))
    result = -p * tl.load(grad + row)
    is_target = (column == tl.load(targets + row)) & (tl.load(is_here + row) != 0)
    result = tl.where(is_target, tl.load(at_target + row), result)
    if WITH_ENTROPY:
        result -= p * (values - tl.load(mean_logits + row)) * tl.load(grad_entropy + row)
    tl.store(start + column, (result * inverse_temperature).to(logits.dtype.element_ty), inside)


def logits_to_gradients(
    logits: Tensor,
    targets: Tensor,
    is_here: Tensor,
    log_sums: Tensor,
    mean_logits: Tensor,
    at_target: Tensor,
    grad: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
) -> None:
    """Put the gradient of the logits [C, V] in their place.

    Args:
        targets: [C] columns; is_here: [C] bool, whether the target lies on this rank.
        log_sums, mean_logits: [C] of whole rows, over all ranks.
        at_target: [C] gradient at the target, before the division by the temperature, without the entropy's part.
        grad: [C] gradient of the log-probabilities.
        grad_entropy: [C] gradient of the entropies, or None.
    """
    if not logits.size(0):
        return
    block = min(8192, triton.next_power_of_2(logits.size(1)))
    _logits_to_gradients[(logits.size(0), triton.cdiv(logits.size(1), block))](
        logits, targets, is_here.to(torch.int8), log_sums, mean_logits, at_target, grad,
        grad if grad_entropy is None else grad_entropy, logits.size(1), logits.stride(0), 1.0 / temperature,
        WITH_ENTROPY=grad_entropy is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
