"""Forward and backward of causal attention over packed sequences on a GPU: every kernel at hand beside each other.

    python benchmarks/gpu_attention.py

Two packings of random bf16 numbers, 16 query heads, 8 key and value heads of 128 dimensions: 16 x 1,024 and 1 x 16,384.
Each way is checked against softmax in float32 (relative error of the output and of the three gradients, in the
Frobenius norm) and timed with CUDA events; TFLOP/s count the products that causal attention needs (backward 2.5 times
forward). A way that does not run says why and the others go on.
"""

# ruff: noqa: E402 (the path is set before slime is imported)
import argparse
import functools
import importlib
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, GROUPS, DIM = 16, 8, 128
PACKINGS: dict[str, tuple[int, ...]] = {"16x1024": (1024,) * 16, "1x16384": (16384,)}
START = time.perf_counter()

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def progress(text: str) -> None:
    """A line with the seconds since the start, at once."""
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Result:
    """What was seen of one way on one packing.

    Attributes:
        milliseconds: forward, and backward.
        errors: relative, of the output and of the gradients of query, key and value.
        problem: why it did not run.
    """

    milliseconds: tuple[float, float] | None = None
    errors: tuple[float, ...] | None = None
    problem: str | None = None


def ways(lengths: Sequence[int]) -> dict[str, Callable[[], Attention]]:
    """Name -> what makes the function of (query [T, H, d], key [T, G, d], value) for these sequences."""
    boundaries = torch.tensor([0, *lengths], device="cuda").cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    ways_here: dict[str, Callable[[], Attention]] = {}

    def slime_way(name: str) -> Callable[[], Attention]:
        def make() -> Attention:
            from slime.backends.megatron.gpu_attention import Sequences, attention_named

            attend = attention_named(name)
            sequences = Sequences(boundaries, boundaries, tuple(lengths), tuple(lengths))
            return lambda q, k, v: attend(q, k, v, sequences, DIM**-0.5)

        return make

    try:
        from slime.backends.megatron.gpu_attention import ATTENTIONS

        ways_here |= {f"slime: {name}": slime_way(name) for name in ATTENTIONS}
    except ImportError:
        progress(traceback.format_exc())
    ways_here["torch varlen, keys repeated"] = lambda: _torch_varlen_repeated(boundaries, longest)
    ways_here["sdpa flash, a batch"] = lambda: _sdpa(lengths, SDPBackend.FLASH_ATTENTION)
    ways_here["sdpa cuDNN, a batch"] = lambda: _sdpa(lengths, SDPBackend.CUDNN_ATTENTION)
    for variant in CudnnVariant.all():
        ways_here[f"cuDNN: {variant}"] = functools.partial(variant.build, lengths)
    ways_here["flash-attn-4"] = lambda: _flash_attn_4(boundaries, longest)
    return ways_here


def _torch_varlen_repeated(boundaries: Tensor, longest: int) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
        return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=DIM**-0.5, window_size=(-1, 0))

    return attend


def _sdpa(lengths: Sequence[int], backend: SDPBackend) -> Attention:
    batch, length = len(lengths), lengths[0]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(batch, length, -1, DIM).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch * length, HEADS, DIM)

    return attend


def _flash_attn_4(boundaries: Tensor, longest: int) -> Attention:
    function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(
            q, k, v, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=longest, max_seqlen_k=longest,
            causal=True, softmax_scale=DIM**-0.5,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


@dataclass(frozen=True)
class CudnnVariant:
    """One way of telling cuDNN the same: to find what its fast kernels need."""

    is_ragged: bool
    is_padded: bool
    at_bottom_right: bool
    is_grouped: bool
    packs_stats: bool = False
    says_total: bool = False

    @staticmethod
    def all() -> list["CudnnVariant"]:
        return [
            CudnnVariant(True, True, True, True),
            CudnnVariant(True, True, False, True),
            CudnnVariant(True, True, False, True, packs_stats=True),
            CudnnVariant(True, True, False, True, packs_stats=True, says_total=True),
            CudnnVariant(True, True, False, False),
            CudnnVariant(False, True, False, True),
            CudnnVariant(False, False, False, True),
            CudnnVariant(False, False, True, True),
        ]

    def __str__(self) -> str:
        words = [
            "ragged" if self.is_ragged else "dense", "padding mask" if self.is_padded else "no padding mask",
            "bottom right" if self.at_bottom_right else "top left", "grouped" if self.is_grouped else "keys repeated",
        ]  # fmt: skip
        return ", ".join(words + ["stats ragged"] * self.packs_stats + ["total given"] * self.says_total)

    def build(self, lengths: Sequence[int]) -> Attention:
        import cudnn

        handle = cudnn.create_handle()
        batch, length = len(lengths), lengths[0]
        groups = GROUPS if self.is_grouped else HEADS
        boundaries = torch.arange(batch + 1, device="cuda") * length
        counts = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        data: dict[int, Tensor] = {
            100: counts,
            101: counts,
            102: boundaries * HEADS * DIM,
            103: boundaries * groups * DIM,
        }
        data[104] = boundaries * HEADS

        def graph_of(is_backward: bool) -> tuple[Any, Tensor]:
            kinds = cudnn.data_type
            graph = cudnn.pygraph(
                io_data_type=kinds.BFLOAT16, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT,
                handle=handle,
            )  # fmt: skip
            marks = {
                uid: graph.tensor(
                    dim=[data[uid].numel(), 1, 1, 1], stride=[1, 1, 1, 1], uid=uid,
                    data_type=kinds.INT32 if uid < 102 else kinds.INT64,
                )
                for uid in data
            }  # fmt: skip

            def rows(uid: int, heads: int, dim: int = DIM, **more: Any) -> Any:
                stride = [length * heads * dim, dim, heads * dim, 1]
                if dim == 1 and not self.packs_stats:
                    stride = [length * heads, length, 1, 1]
                found = graph.tensor(dim=[batch, heads, length, dim], stride=stride, uid=uid, **more)
                return ragged(found, heads, dim)

            def ragged(tensor: Any, heads: int, dim: int) -> Any:
                if self.is_ragged and (dim > 1 or self.packs_stats):
                    tensor.set_ragged_offset(marks[104 if dim == 1 else 102 if heads == HEADS else 103])
                return tensor

            def result(tensor: Any, uid: int, heads: int, dim: int = DIM) -> None:
                tensor.set_output(True).set_uid(uid).set_dim([batch, heads, length, dim])
                if dim == 1 and not self.packs_stats:
                    tensor.set_stride([length * heads, length, 1, 1])
                else:
                    tensor.set_stride([length * heads * dim, dim, heads * dim, 1])
                ragged(tensor, heads, dim)
                if dim == 1:
                    tensor.set_data_type(kinds.FLOAT)

            q, k, v = rows(1, HEADS), rows(2, groups), rows(3, groups)
            alignment = cudnn.diagonal_alignment
            more: dict[str, Any] = dict(
                attn_scale=DIM**-0.5, diagonal_band_right_bound=0,
                diagonal_alignment=alignment.BOTTOM_RIGHT if self.at_bottom_right else alignment.TOP_LEFT,
            )  # fmt: skip
            if self.is_padded:
                more |= dict(use_padding_mask=True, seq_len_q=marks[100], seq_len_kv=marks[101])
            if is_backward:
                if self.says_total:
                    more |= dict(max_total_seq_len_q=batch * length, max_total_seq_len_kv=batch * length)
                o, grad, stats = rows(4, HEADS), rows(6, HEADS), rows(5, HEADS, 1, data_type=kinds.FLOAT)
                outputs = graph.sdpa_backward(q=q, k=k, v=v, o=o, dO=grad, stats=stats, **more)
                for tensor, uid, heads in zip(outputs, (7, 8, 9), (HEADS, groups, groups), strict=True):
                    result(tensor, uid, heads)
            else:
                out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **more)
                result(out, 4, HEADS)
                result(stats, 5, HEADS, 1)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
            return graph, torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device="cuda")

        forward_graph, backward_graph = graph_of(False), graph_of(True)

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out, stats = torch.empty_like(q), q.new_empty(batch, HEADS, length, dtype=torch.float32)
                forward_graph[0].execute(data | {1: q, 2: k, 3: v, 4: out, 5: stats}, forward_graph[1], handle=handle)
                ctx.save_for_backward(q, k, v, out, stats)
                return out

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
                q, k, v, out, stats = ctx.saved_tensors
                gradients = [torch.empty_like(x) for x in (q, k, v)]
                pack = data | {1: q, 2: k, 3: v, 4: out, 5: stats, 6: grad.contiguous()}
                backward_graph[0].execute(
                    pack | dict(zip((7, 8, 9), gradients, strict=True)), backward_graph[1], handle=handle
                )
                return tuple(gradients)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not self.is_grouped:
                k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
            cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
            return Function.apply(q, k, v)

        return attend


def drawn(lengths: Sequence[int]) -> list[Tensor]:
    """Query, key, value and the gradient of the output, bf16."""
    generator = torch.Generator("cuda").manual_seed(0)
    total = sum(lengths)
    return [
        torch.randn(total, heads, DIM, device="cuda", generator=generator).bfloat16()
        for heads in (HEADS, GROUPS, GROUPS, HEADS)
    ]


def reference(lengths: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients in float32, head by head."""
    query, key, value, grad = (x.float() for x in tensors)
    results = [torch.zeros_like(x) for x in (query, query, key, value)]
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        hidden = torch.ones(length, length, dtype=torch.bool, device="cuda").triu(1)
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            q, k, v = query[rows, head], key[rows, group], value[rows, group]
            p = (q @ k.t()).mul_(DIM**-0.5).masked_fill_(hidden, -math.inf).softmax(-1)
            g = grad[rows, head]
            results[0][rows, head] = p @ v
            results[3][rows, group] += p.t() @ g
            grad_scores = g @ v.t()
            grad_scores.sub_((grad_scores * p).sum(-1, keepdim=True)).mul_(p).mul_(DIM**-0.5)
            results[1][rows, head] = grad_scores @ k
            results[2][rows, group] += grad_scores.t() @ q
            del p, grad_scores
        start += length
    return results


def measure(make: Callable[[], Attention], tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> Result:
    """Errors of one way, and its times: medians of seven runs after two."""
    try:
        attend = make()
        inputs = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        out = attend(*inputs)
        gradients = torch.autograd.grad(out, inputs, tensors[3])
        errors = tuple(
            float((mine.float() - theirs).norm() / theirs.norm())
            for mine, theirs in zip((out.detach(), *gradients), expected, strict=True)
        )
        times: list[tuple[float, float]] = []
        for _ in range(9):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            events[0].record()
            out = attend(*inputs)
            events[1].record()
            torch.autograd.grad(out, inputs, tensors[3])
            events[2].record()
            torch.cuda.synchronize()
            times.append((events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])))
        forward, backward = (statistics.median(part) for part in zip(*times[2:], strict=True))
        return Result((forward, backward), errors)
    except Exception as error:
        torch.cuda.synchronize()
        return Result(problem=f"{type(error).__name__}: {str(error).strip()[:600]}")


def compare(only: Sequence[str] = ()) -> dict[str, dict[str, Result]]:
    """Packing -> way -> what was seen."""
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, dict[str, Result]] = {}
    for packing, lengths in PACKINGS.items():
        tensors = drawn(lengths)
        expected = reference(lengths, tensors)
        results[packing] = {}
        for name, make in ways(lengths).items():
            if only and not any(part in name for part in only):
                continue
            results[packing][name] = seen = measure(make, tensors, expected)
            progress(f"attention {packing} {name}: {seen.problem or seen.milliseconds}")
        del expected
        torch.cuda.empty_cache()
    return results


def table(results: dict[str, dict[str, Result]]) -> str:
    """One line a packing and way."""
    lines = [
        "| attention | kernel | forward, ms | backward, ms | TFLOP/s | error of out, dq, dk, dv |",
        "|---" * 6 + "|",
    ]
    for packing, by_way in results.items():
        # two products of [L, L / 2] with d a head forward, five backward
        work = 7 * sum(length * length for length in PACKINGS[packing]) * DIM * HEADS
        for name, seen in by_way.items():
            if seen.milliseconds is None or seen.errors is None:
                lines.append(f"| {packing} | {name} | {' '.join((seen.problem or '').split())[:160]} ||||")
                continue
            forward, backward = seen.milliseconds
            errors = " ".join(f"{error:.1e}" for error in seen.errors)
            rate = work / (forward + backward) / 1e9
            lines.append(f"| {packing} | {name} | {forward:.2f} | {backward:.2f} | {rate:.0f} | {errors} |")
    return "\n".join(lines)


def main() -> int:
    """Measure all ways, or those whose names contain one of the words given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words of the ways to measure")
    print(table(compare(parser.parse_args().only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
