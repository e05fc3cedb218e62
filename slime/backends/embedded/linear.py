"""Linear layers as the engine computes them: HuggingFace matrices stacked by rows, in the CPU's fastest layout.

Letters: N outputs, K inputs. A matrix is [N, K] as in `torch.nn.Linear`. Stacking q, k and v (or gate and up) makes one
product of two or three; the parts are handed to the model's own code as if each had been computed by itself.
"""

import platform
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR_ROWS = 64
"""The number of rows that oneDNN is told to expect; the layout it chooses serves other numbers too."""

FEW_NORM_ROWS = 8
"""Up to here bf16 rows are normalized through torch's layer norm."""
SIGNS = torch.tensor([[1.0], [-1.0]], dtype=torch.bfloat16)


class Matrix(Protocol):
    """The memory of one served matrix [N, K], written and read by blocks of rows."""

    dtype: torch.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] -> [..., N]."""

    def write(self, start: int, rows: Tensor) -> None:
        """Replace rows from `start`; what computes changes with `flush`, or as soon as every row was replaced."""

    def flush(self) -> None:
        """Put everything written since the last flush into the memory that computes, if no row is missing."""

    def dense(self) -> Tensor:
        """[N, K] contiguous, made from the memory that computes."""

    def release(self) -> None:
        """Give the memory back."""


class DenseMatrix:
    """Rows in plain memory, multiplied by `torch.nn.functional.linear`: works on every CPU."""

    def __init__(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (num_rows, num_columns), dtype
        self.weight: Tensor | None = None

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)  # type: ignore[arg-type]

    def write(self, start: int, rows: Tensor) -> None:
        if self.weight is None:
            self.weight = torch.empty(self.shape, dtype=self.dtype)
        self.weight[start : start + rows.shape[0]] = rows

    def flush(self) -> None:
        """Nothing to do: rows are written where they compute."""

    def dense(self) -> Tensor:
        assert self.weight is not None, "read of a released matrix"
        return self.weight

    def release(self) -> None:
        self.weight = None


class PackedMatrix:
    """Rows reordered into oneDNN's blocked layout: twice as fast as a plain product, in bf16 and in fp32.

    Reordering moves numbers and changes none, so `dense` gives back the exact bytes that were stored; an fp32 product
    differs from a plain one only in the order of its sums.
    """

    def __init__(self, num_rows: int, num_columns: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (num_rows, num_columns), dtype
        self.packed: Tensor | None = None
        self._staged: Tensor | None = None
        self._is_missing = torch.ones(num_rows, dtype=torch.bool)
        self._linear = torch.ops.mkldnn._linear_pointwise.default  # naming the overload saves choosing it at each call

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._linear(x, self.packed, bias, "none", [], "")

    def write(self, start: int, rows: Tensor) -> None:
        if rows.shape == self.shape:  # straight from where it came
            self._pack(rows)
            return
        if self._staged is None:
            self._staged = torch.empty(self.shape, dtype=self.dtype)
            self._is_missing.fill_(True)
        self._staged[start : start + rows.shape[0]] = rows
        self._is_missing[start : start + rows.shape[0]] = False
        if not self._is_missing.any():
            self._pack(self._staged)

    def flush(self) -> None:
        if self._staged is None or self.packed is None:
            return
        self._staged[self._is_missing] = self.dense()[self._is_missing]
        self._pack(self._staged)

    def _pack(self, rows: Tensor) -> None:
        """Staging memory is given back at once, so that the next matrix takes the same: new pages are what costs."""
        self.packed = None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(rows.contiguous(), PACKED_FOR_ROWS)
        self._staged = None

    def dense(self) -> Tensor:
        assert self.packed is not None, "read of a released matrix"
        return self.packed.to_dense()

    def release(self) -> None:
        self.packed = self._staged = None


def new_matrix(num_rows: int, num_columns: int, dtype: torch.dtype) -> Matrix:
    """The fastest kind of matrix for this dtype on this CPU."""
    kind = PackedMatrix if can_pack(dtype) else DenseMatrix
    return kind(num_rows, num_columns, dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype on this CPU with instructions made for it."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class StackedLinear(nn.Module):
    """Stands for one `nn.Linear` of the model, or for several that read the same input.

    It takes the place of the first of them; `LinearPart`s take the places of the others.
    """

    bias: Tensor | None

    def __init__(self, linears: list[nn.Linear], dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.in_features = linears[0].in_features
        self.matrix = new_matrix(sum(self.sizes), self.in_features, dtype)
        has_bias = any(linear.bias is not None for linear in linears)
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes), dtype=dtype), requires_grad=False) if has_bias else None
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def product(self, x: Tensor) -> Tensor:
        """All parts side by side: x [..., K] -> [..., N]."""
        return self.matrix.product(x, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.sizes) == 1:
            return self.matrix.product(x, self.bias)
        self._outputs = self.matrix.product(x, self.bias).split(self.sizes, dim=-1)
        self._input = x
        return self._outputs[0]

    def part(self, index: int, x: Tensor) -> Tensor:
        """The rows of one part, from the product that `forward` has already made of the same `x`."""
        if self._input is not x:
            return self.matrix.product(x, self.bias).split(self.sizes, dim=-1)[index]
        out = self._outputs[index]
        if index == len(self.sizes) - 1:
            self._input, self._outputs = None, ()
        return out


class LinearPart(nn.Module):
    """The second or a later part of a `StackedLinear`."""

    def __init__(self, stacked: StackedLinear, index: int) -> None:
        super().__init__()
        self._stacked = (stacked,)  # in a tuple, so that its weights are not registered twice
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._stacked[0].part(self.index, x)


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in one call.

    fp32 is bit-equal to the modules it replaces; in bf16 the product with the weight is rounded once instead of twice.
    Up to `few_rows` bf16 rows go through torch's layer norm, one kernel instead of seven: beside its mirror image x has
    no mean, and its variance is its mean square. `few_rows` = 0 gives a row the same bits among any number of rows.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.shape = tuple(weight.shape)
        self.few_rows = FEW_NORM_ROWS
        self._wide = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.numel() <= self.few_rows * self.shape[0]:
            wide = self._wide if self._wide.data_ptr() == self.weight.data_ptr() else self._widen()
            mirrored = x[..., None, :] * SIGNS
            return torch.layer_norm(mirrored, wide.shape, wide, None, self.eps)[..., 0, :]
        return F.rms_norm(x, self.shape, self.weight, self.eps)

    @torch.inference_mode(False)
    def _widen(self) -> Tensor:
        """Move the weight into the first row of [2, N], where it is still written; the mirror image needs none."""
        wide = self.weight.data.new_zeros(2, *self.shape)
        wide[0] = self.weight.data
        self.weight.data = wide[0]
        self._wide = wide
        return wide
