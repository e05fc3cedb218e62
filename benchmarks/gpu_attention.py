"""Forward and backward of causal attention over packed sequences on a GPU: every kernel at hand beside each other.

    python benchmarks/gpu_attention.py

Packings of random bf16 numbers, 16 query heads, 8 key and value heads of 128 dimensions: 16 x 1,024 and 1 x 16,384, and
sequences near the length from which on slime's own way takes cuDNN, one of which cuDNN gets padded (4,200 to 4,608).
Each way is checked against softmax in float32 (relative error of the output and of the three gradients, in the
Frobenius norm) and timed with CUDA events; TFLOP/s count the products that causal attention needs (backward 2.5 times
forward). A way that does not run says why and the others go on.
"""

# ruff: noqa: E402 (the path is set before slime is imported)
import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slime.backends.megatron.gpu_attention import ATTENTIONS, Sequences, attention_named

HEADS, GROUPS, DIM = 16, 8, 128
PACKINGS: dict[str, tuple[int, ...]] = {
    "16x1024": (1024,) * 16, "8x2048": (2048,) * 8, "4x4096": (4096,) * 4, "4x4200": (4200,) * 4, "1x16384": (16384,),
}  # fmt: skip
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
            attend = attention_named(name)
            sequences = Sequences(boundaries, boundaries, tuple(lengths), tuple(lengths))
            return lambda q, k, v: attend(q, k, v, sequences, DIM**-0.5)

        return make

    ways_here |= {f"slime: {name}": slime_way(name) for name in ATTENTIONS}
    ways_here["torch varlen, keys repeated"] = lambda: _torch_varlen_repeated(boundaries, longest)
    ways_here["sdpa flash, a batch"] = lambda: _sdpa(lengths, SDPBackend.FLASH_ATTENTION)
    ways_here["sdpa cuDNN, a batch"] = lambda: _sdpa(lengths, SDPBackend.CUDNN_ATTENTION)
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
