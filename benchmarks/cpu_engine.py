"""Tokens per CPU-second of the embedded engine, beside transformers' generate, another engine, and the limits.

    python benchmarks/cpu_engine.py --model-path DIR [--against MODULE.py] [--dtype bfloat16 float32] [--batch 1 16 64]

Each batch is made of prompts of --prompt-tokens random tokens, each shared by --group requests, and makes --new-tokens
tokens a request, drawn at temperature 1. Time is CPU time of this process and all its threads, so that a busy machine
disturbs less; one thread computes; the ways take turns --repeats times and the median of each is shown.

What each side does: the embedded engine and the other module compute a shared prompt once and give the log-prob of
every token; transformers' generate computes every prompt and gives no log-probs (that is in its favour). None of them
has HTTP in it. A module named with --against must have `Engine(path, dtype=...)` with `run(requests)` and
`Req(ids, max_new_tokens=..., ignore_eos=...)`. The engine's weights lie in large pages, as its server puts them.

The limit of a batch counts the products of one new token of every sequence and nothing else (no prompt, no attention,
no sampling). Both terms are measured in this run, with the same thread: reading all matrices once at the speed of a sum
over --stream-mib of memory, and the model's own matrices as the engine keeps them, each multiplied by 64 rows. Each
step takes at least the larger of reading them and multiplying the batch's rows at that rate.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from slime.backends.embedded.engine import Engine, EngineSettings, make_request
from slime.backends.embedded.linear import StackedLinear
from slime.backends.embedded.model import DTYPES, ServedModel
from slime.backends.embedded.protocol import SamplingParams

Run = Callable[[list[list[int]], int], None]
"""Generates that many tokens for each prompt."""
ENGINE, GENERATE = "embedded", "generate"
LIMIT_ROWS = 64
"""Rows of the products whose rate is the limit of large batches."""
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


@dataclass(frozen=True)
class Limits:
    """What one thread of this machine can do with one model: `bandwidth` in bytes/s, `rate` in multiply-adds/s."""

    matrix_bytes: int
    multiply_adds: int
    bandwidth: float
    rate: float

    def tokens_per_s(self, batch: int) -> float:
        """Largest number of new tokens a second with `batch` sequences at a time."""
        return batch / max(self.matrix_bytes / self.bandwidth, batch * self.multiply_adds / self.rate)


def move_into_large_pages() -> int:
    """Ask Linux to move this process's private memory into large pages; returns the bytes that it did move.

    0 where the system has no such call (Linux before 6.1) or no such pages to give: nothing but speed depends on it.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for start, size in private_regions(maps.read_text()):
        madvise(start, size, _MADV_HUGEPAGE)
        if madvise(start, size, _MADV_COLLAPSE) == 0:
            moved += size
    return moved


def private_regions(maps: str) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the whole large pages in every anonymous region that may be written."""
    for line in maps.splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        if rights != "rw-p" or inode != "0":
            continue
        first, end = (int(address, 16) for address in addresses.split("-"))
        start = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        size = end // _HUGE_PAGE * _HUGE_PAGE - start
        if size > 0:
            yield start, size


def embedded(model: ServedModel) -> Run:
    """This project's engine, its weights in large pages: a server gets them by the environment it is started in."""
    move_into_large_pages()
    engine = Engine(model, EngineSettings(max_running_requests=64))

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        for index, prompt in enumerate(prompts):
            engine.scheduler.add(
                make_request(
                    engine,
                    rid=str(index),
                    prompt=prompt,
                    sampling=SamplingParams(),
                    max_new_tokens=new_tokens,
                    wants_log_probs=True,
                )
            )
        engine.run_until_idle()

    return run


def transformers_generate(path: str, dtype: torch.dtype) -> Run:
    """transformers' own generate, all prompts in one batch, without log-probs."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    @torch.inference_mode()
    def run(prompts: list[list[int]], new_tokens: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )

    return run


def other_module(file: str, path: str, dtype: torch.dtype) -> Run:
    """An engine of the interface that the module docstring names."""
    spec = importlib.util.spec_from_file_location("other_engine", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = module.Engine(path, dtype=dtype)

    def run(prompts: list[list[int]], new_tokens: int) -> None:
        engine.run([module.Req(prompt, max_new_tokens=new_tokens, ignore_eos=True) for prompt in prompts])

    return run


def make_prompts(batch: int, group: int, length: int, vocab_size: int) -> list[list[int]]:
    """`batch` prompts of `length` tokens, `group` neighbours alike."""
    generator = torch.Generator().manual_seed(batch)
    drawn = [torch.randint(vocab_size, (length,), generator=generator).tolist() for _ in range(-(-batch // group))]
    return [drawn[index // group] for index in range(batch)]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads, that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.inference_mode()
def measure_limits(model: ServedModel, stream_mib: int, repeats: int) -> Limits:
    """Stream bandwidth, and the rate of the model's own matrices with `LIMIT_ROWS` rows; medians over `repeats`."""
    memory = torch.ones(stream_mib << 18)
    streams = [cpu_seconds(memory.sum) for _ in range(repeats + 1)][1:]
    bandwidth = memory.nbytes / statistics.median(streams)
    del memory
    linears = [module for module in model.module.modules() if isinstance(module, StackedLinear)]
    inputs = {size: torch.randn(LIMIT_ROWS, size).to(model.dtype) for size in {m.in_features for m in linears}}
    numbers = sum(sum(linear.sizes) * linear.in_features for linear in linears)
    products = [
        cpu_seconds(lambda: [linear.product(inputs[linear.in_features]) for linear in linears])
        for _ in range(repeats + 1)
    ][1:]
    rate = LIMIT_ROWS * numbers / statistics.median(products)
    return Limits(numbers * model.dtype.itemsize, numbers, bandwidth, rate)


def alternate(ways: dict[str, Run], prompts: list[list[int]], new_tokens: int, repeats: int) -> dict[str, float]:
    """Let the ways take turns; median tokens per CPU-second of each, after a short run to warm up."""
    for run in ways.values():
        run(prompts, min(new_tokens, 8))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(cpu_seconds(lambda run=run: run(prompts, new_tokens)))  # type: ignore[misc]
    return {name: len(prompts) * new_tokens / statistics.median(times) for name, times in seconds.items()}


def report(dtype: str, batch: int, rates: dict[str, float], limit: float) -> str:
    """One row of the table: tokens per CPU-second of each way, then the engine's ratio to each."""
    ours = rates[ENGINE]
    others = {name: rate for name, rate in rates.items() if name != ENGINE} | {"limit": limit}
    cells = [dtype, str(batch), f"{ours:.1f}", *(f"{rate:.1f}" for rate in others.values())]
    return "| " + " | ".join([*cells, *(f"{ours / rate:.2f}" for rate in others.values())]) + " |"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder in HuggingFace format")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="requests that share a prompt")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way; the median is shown")
    parser.add_argument("--stream-mib", type=int, default=512, help="memory read for the bandwidth: beyond all caches")
    parser.add_argument("--against", metavar="MODULE.py", help="another engine to measure beside")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' generate out")
    parser.add_argument("--quick", action="store_true", help="one turn of each way: a look, not a measurement")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table: one row a dtype and batch."""
    args = parse(arguments)
    repeats = 1 if args.quick else args.repeats
    torch.set_num_threads(1)
    with open(os.path.join(args.model_path, "config.json")) as file:
        vocab_size = json.load(file)["vocab_size"]
    for number, dtype in enumerate(args.dtype):
        gc.collect()
        model = ServedModel(args.model_path, DTYPES[dtype])
        ways = {ENGINE: embedded(model)}
        if not args.no_transformers:
            ways[GENERATE] = transformers_generate(args.model_path, DTYPES[dtype])
        if args.against:
            ways[os.path.basename(args.against)] = other_module(args.against, args.model_path, DTYPES[dtype])
        if number == 0:
            others = [name for name in ways if name != ENGINE] + ["limit"]
            header = ["dtype", "batch", ENGINE, *others, *(f"to {name}" for name in others)]
            print("Tokens per CPU-second, and the embedded engine's ratio to each of the others:\n")
            print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        for batch in args.batch:
            # Measured beside each batch, so that what else runs on the machine disturbs both alike.
            limits = measure_limits(model, args.stream_mib, repeats)
            prompts = make_prompts(batch, args.group, args.prompt_tokens, vocab_size)
            rates = alternate(ways, prompts, args.new_tokens, repeats)
            print(report(dtype, batch, rates, limits.tokens_per_s(batch)), flush=True)


if __name__ == "__main__":
    main()
