"""A whole training step on one GPU: slime's trainer with each choice of kernels, beside transformers on the same work.

    python benchmarks/gpu_trainer.py [--profile] [--no-attention] [--only WORDS] [--repeats 5]

The model has the shape of Qwen3-0.6B with random weights; nothing is read from a network. Two packings of random
tokens, a loss on every position: 16 x 1,024 and 1 x 16,384. Our side is the trainer as a run builds it (the flags of
train.py through `MegatronTrainer`, one rank, NCCL, distributed optimizer with float32 main weights), a step is zeroed
gradients, forward, backward, norm, clip and Adam. Their side is transformers' model with sdpa attention, its own loss,
clip_grad_norm_ and torch's fused AdamW on bf16 weights. Each figure is a median. A way that does not run says why.
Before it, all attention kernels beside each other (gpu_attention.py); the table comes last, and what was wanted of it.

    python benchmarks/gpu_trainer.py --tiny      # without a GPU: tries the program itself, its figures say nothing
"""

# ruff: noqa: E402 (environment and path are set before torch and slime are imported)
import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch
from gpu_attention import progress
from gpu_kernels import profiled
from torch import Tensor

from slime.arguments import parse_args
from slime.backends.megatron.trainer import MegatronTrainer
from slime.data.batch import split_train_data_by_dp
from slime.utils.processes import free_port

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
TINY = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 999}  # fmt: skip
PEAK_TFLOPS = 989.0
"""Dense bf16 of an H200, by its data sheet."""
BASELINE = "transformers, sdpa"


@dataclass(frozen=True)
class Workload:
    """Sequences of one row; every position has a loss (the last token of each is only a target).

    Attributes:
        tokens: [B, S + 1] token ids.
    """

    name: str
    tokens: Tensor

    @property
    def num_positions(self) -> int:
        return self.tokens.size(0) * (self.tokens.size(1) - 1)


@dataclass(frozen=True)
class Wanted:
    """What a whole step of one workload must reach on an H200.

    Attributes:
        tokens_per_s: with flash attention, and where cuDNN runs.
        ratio: to transformers in the same run; 0: none is asked for.
    """

    tokens_per_s: tuple[float, float]
    ratio: float


WANTED = {"16x1024": Wanted((80_000, 80_000), 1.5), "1x16384": Wanted((36_000, 45_000), 0.0)}


class Heard(logging.Handler):
    """What the attention kernels say of themselves: shown at once, and kept until it is asked for."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._words: list[str] = []
        logger = logging.getLogger("slime.backends.megatron.gpu_attention")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._words.append(record.getMessage())
        progress(record.getMessage())

    def taken(self) -> str:
        words, self._words = self._words, []
        return "" if not words else "cuDNN refused" if any("does not run" in each for each in words) else "cuDNN"


@dataclass
class Figures:
    """What was seen of one way on one workload.

    Attributes:
        parts: medians in seconds of forward and backward, and of the optimizer.
        peak_bytes: most memory that tensors held.
        attention: what the trainer said of cuDNN while it ran; empty for flash attention alone.
        problem: why it did not run.
        groups: kernel -> (milliseconds, launches) of one step, if profiled.
    """

    way: str
    workload: str
    parts: tuple[float, float] | None = None
    loss: float = 0.0
    peak_bytes: int = 0
    attention: str = ""
    problem: str | None = None
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)


def run_args(model: Path, folder: Path, device: str, extra: Sequence[str] = ()) -> Namespace:
    """What train.py would make of the command line of such a run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "never read", "label": "0"}\n')
    return parse_args(
        [
            *("--hf-checkpoint", str(model), "--prompt-data", str(prompts), "--input-key", "prompt"),
            *("--output-dir", str(folder), "--run-name", "benchmark", "--device", device, "--debug-train-only"),
            *("--loss-type", "sft_loss", "--disable-compute-advantages-and-returns", "--calculate-per-token-loss"),
            *("--num-rollout", "1", "--rollout-batch-size", "1", "--n-samples-per-prompt", "1"),
            *("--rollout-max-response-len", "1", "--rm-type", "random", "--lr", "1e-6"),
            *("--actor-num-nodes", "1", "--actor-num-gpus-per-node", "1", "--num-gpus-per-node", "1"),
            *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "65536", "--bf16", *extra),
        ]
    )


def save_model(shape: dict[str, Any], folder: Path, device: torch.device) -> Path:
    """A HuggingFace folder with random weights of this shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path = folder / "model"
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(shape | {"torch_dtype": "bfloat16"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text("{}")
    return path


Parts = tuple[Callable[[], Callable[[], float]], Callable[[], None]]
"""Forward and backward (gives what reads the loss, which waits for the device), and the optimizer."""


class Ours:
    """The trainer of a run, asked for one step in its two parts."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._trainer = MegatronTrainer(args, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
        self._trainer.init()

    def parts(self, work: Workload) -> Parts:
        from slime.algorithm.loss import get_loss_function
        from slime.backends.megatron import optimizer as optimizers
        from slime.backends.megatron.microbatches import Packer, local_rollout, train_steps
        from slime.backends.megatron.passes import forward_backward, step_metrics

        args, job = self._args, self._trainer.job
        packer = Packer(args, job.parallel_config, self._trainer.accelerator.device)
        loss_function = get_loss_function(args)
        data = job._on_device(local_rollout(self._shard(work)))
        (step,) = train_steps(data)

        def loss_and_gradients() -> Callable[[], float]:
            for model in job.models:
                model.zero_grad_buffer()
            job.optimizer.zero_grad()
            records = forward_backward(args, job.models, packer, data, step, loss_function)
            return lambda: step_metrics(args, records, step)["loss"]

        def optimizer_step() -> None:
            assert optimizers.step(job.optimizer).is_applied

        return loss_and_gradients, optimizer_step

    def _shard(self, work: Workload) -> dict[str, Any]:
        count, length = work.tokens.shape
        response = length - 1
        rollout = {
            "tokens": work.tokens.tolist(), "response_lengths": [response] * count, "rewards": [0.0] * count,
            "raw_reward": [0.0] * count, "truncated": [0] * count, "sample_indices": list(range(count)),
            "group_indices": list(range(count)), "rollout_ids": list(range(count)),
            "loss_masks": [[1] * response] * count, "rollout_mask_sums": [response] * count,
        }  # fmt: skip
        args = Namespace(**{**vars(self._args), "global_batch_size": count})
        (shard,) = split_train_data_by_dp(args, rollout, self._trainer.job.parallel_config)
        return shard

    def close(self) -> None:
        self._trainer.close()


class Theirs:
    """transformers' own model and loss, and a plain training step."""

    def __init__(self, model: Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model = loaded.to(device)
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)
        self._device = device

    def parts(self, work: Workload) -> Parts:
        tokens = work.tokens.to(self._device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

        def loss_and_gradients() -> Callable[[], float]:
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
            loss.backward()
            return lambda: float(loss.detach())

        def optimizer_step() -> None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()

        return loss_and_gradients, optimizer_step

    def close(self) -> None:
        pass


def measure(way: str, work: Workload, parts: Parts, options: Namespace) -> Figures:
    """Medians of `--repeats` steps after two. Nothing waits between the parts, which the device's clock tells apart."""
    loss_and_gradients, optimizer_step = parts
    on_gpu = torch.cuda.is_available()
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(options.repeats + 2):
        synchronize()
        start = time.perf_counter()
        begin = moment(on_gpu)
        read_loss = loss_and_gradients()
        middle = moment(on_gpu)
        optimizer_step()
        synchronize()
        whole = time.perf_counter() - start
        first = begin.elapsed_time(middle) / 1e3 if on_gpu else middle - begin
        seconds.append((first, whole - first))
        losses.append(read_loss())
    forward_backward, optimizer = (statistics.median(part) for part in zip(*seconds[2:], strict=True))
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    figures = Figures(way, work.name, (forward_backward, optimizer), losses[0], peak)
    if options.profile and on_gpu:
        figures.groups = profiled(loss_and_gradients, optimizer_step)
    return figures


def moment(on_gpu: bool) -> Any:
    """Now: of the device, as an event, or in seconds."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@contextmanager
def reported(results: list[Figures], way: str, workload: str) -> Iterator[None]:
    """An exception becomes a line of the table."""
    try:
        yield
    except Exception as error:
        progress(traceback.format_exc())
        text = " ".join(str(error).split())[:300]
        results.append(Figures(way, workload, problem=f"{type(error).__name__}: {text}"))


def choices(device: torch.device) -> dict[str, Any]:
    """Name of each way of our trainer -> what to force of `slime.backends.megatron.kernels`."""
    from slime.backends.megatron.kernels import ATTENTION_NAMES, CPU, POINTWISE_NAMES

    if device.type == "cpu":
        return {CPU.name: None}
    ways: dict[str, Any] = {}
    for pointwise in POINTWISE_NAMES:
        ways[f"{pointwise}, {ATTENTION_NAMES[0]}"] = {"pointwise": pointwise, "attention": ATTENTION_NAMES[0]}
    for attention in ATTENTION_NAMES:
        ways.setdefault(f"{POINTWISE_NAMES[0]}, {attention}", {"pointwise": POINTWISE_NAMES[0], "attention": attention})
    return ways


@contextmanager
def forced(choice: dict[str, str] | None) -> Iterator[None]:
    """What a trainer that is built meanwhile takes."""
    if choice is None:
        yield
        return
    from slime.backends.megatron import kernels

    with kernels.forced(**choice):
        yield


def compare(options: Namespace, folder: Path, works: Sequence[Workload], shape: dict[str, Any]) -> list[Figures]:
    """All ways on all workloads, transformers first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Figures] = []
    heard = Heard()
    model = save_model(shape, folder, device)
    progress("model made")

    def run(way: str, make: Callable[[], Any]) -> None:
        if options.only and not any(word in way for word in options.only):
            return
        side = None
        with reported(results, way, "start"):
            side = make()
            progress(f"{way}: built")
            for work in works:
                with reported(results, way, work.name):
                    figures = measure(way, work, side.parts(work), options)
                    figures.attention = heard.taken()
                    results.append(figures)
                    progress(f"{way} {work.name}: {figures.parts} s, loss {figures.loss:.4f}")
                _free(device)
        if side is not None:
            side.close()
            del side
        _free(device)

    run(BASELINE, lambda: Theirs(model, device))
    for way, choice in choices(device).items():
        with forced(choice):
            run(f"slime: {way}", lambda: Ours(run_args(model, folder, device.type, options.flags)))
    return results


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def floating_point_operations(shape: dict[str, Any], work: Workload) -> float:
    """Of the products of one step: 6 a weight and position, and causal attention (7 L^2 d a head and layer)."""
    hidden, layers, head_dim = shape["hidden_size"], shape["num_hidden_layers"], shape["head_dim"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    layer = hidden * head_dim * (2 * heads + 2 * groups) + 3 * hidden * shape["intermediate_size"]
    weights = layers * layer + shape["vocab_size"] * hidden
    count, length = work.tokens.size(0), work.tokens.size(1) - 1
    return 6.0 * weights * work.num_positions + 7.0 * count * length * length * head_dim * heads * layers


def attention_table() -> str:
    """What gpu_attention.py prints, in a process of its own: a kernel that fails may leave the device unusable."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_attention.py")]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("|"):
                lines.append(line.rstrip())
            else:
                print(line, end="", flush=True)
    return "\n".join(lines) or f"gpu_attention.py ended with {process.returncode} and no table"


def print_tables(results: Sequence[Figures], works: Sequence[Workload], shape: dict[str, Any]) -> None:
    """Kernel groups of each profiled way, then one line a way and workload."""
    for figures in results:
        if figures.groups:
            total = sum(time for name, (time, _) in figures.groups.items() if not name.startswith("nothing"))
            print(f"\nkernels of {figures.way}, {figures.workload}: {total:.1f} ms on the device")
            largest = sorted(figures.groups.items(), key=lambda item: -item[1][0])[:22]
            for name, (milliseconds, count) in largest:
                print(f"  {milliseconds:8.2f} ms {count:6d} x  {name}")
    print(f"\nrepeats as given; share of {PEAK_TFLOPS:.0f} TFLOP/s; ratio to transformers in this run")
    columns = ["positions", "way", "tokens/s", "ratio", "forward+backward, ms", "optimizer, ms", "share", "peak GiB"]
    print(f"| {' | '.join([*columns, 'loss', 'cuDNN'])} |\n{'|---' * (len(columns) + 2)}|")
    verdicts = []
    for work in works:
        speeds: dict[str, float] = {}
        for figures in results:
            if figures.workload not in (work.name, "start"):
                continue
            if figures.parts is None:
                print(f"| {work.name} | {figures.way} | {figures.problem} |")
                continue
            step = sum(figures.parts)
            speeds[figures.way] = work.num_positions / step
            ratio = speeds[figures.way] / speeds.get(BASELINE, float("nan"))
            share = floating_point_operations(shape, work) / step / PEAK_TFLOPS / 1e12
            forward_backward, optimizer = (1e3 * part for part in figures.parts)
            print(
                f"| {work.name} | {figures.way} | {speeds[figures.way]:,.0f} | {ratio:.2f} | {forward_backward:.1f} "
                f"| {optimizer:.1f} | {share:.1%} | {figures.peak_bytes / 2**30:.1f} | {figures.loss:.4f} "
                f"| {figures.attention or '-'} |"
            )
            if work.name in WANTED and figures.way.startswith("slime: Triton"):  # what a run takes
                verdicts.append(verdict(figures, WANTED[work.name], speeds[figures.way], ratio))
    print("\n" + "\n".join(verdicts))


def verdict(figures: Figures, wanted: Wanted, speed: float, ratio: float) -> str:
    """One line: what was wanted and seen. A ratio without transformers' figure is not reached."""
    least = wanted.tokens_per_s[figures.attention == "cuDNN"]
    asked = f"{least:,.0f} tokens/s" + (f" and {wanted.ratio} x transformers" if wanted.ratio else "")
    is_met = speed >= least and (not wanted.ratio or ratio >= wanted.ratio)
    return (
        f"{figures.workload}, {figures.way}: {speed:,.0f} tokens/s, {ratio:.2f} x transformers; "
        f"wanted {asked}: {'met' if is_met else 'NOT met'}"
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="the largest groups of kernels of each way")
    parser.add_argument("--no-attention", action="store_true", help="only whole steps")
    parser.add_argument("--no-steps", action="store_true", help="only attention")
    parser.add_argument("--only", nargs="*", default=[], help="words of the ways to measure")
    parser.add_argument("--repeats", type=int, default=5, help="steps of which the median is taken")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the program itself, also on a CPU")
    parser.add_argument("--flags", nargs="*", default=[], help="more flags of train.py, without their dashes")
    options = parser.parse_args()
    options.flags = [word if word[0].isdigit() else f"--{word}" for word in options.flags]
    warnings.filterwarnings("ignore")
    on_gpu = torch.cuda.is_available()
    attention = attention_table() if on_gpu and not options.no_attention else ""
    shape, results = (TINY if options.tiny else SHAPE), []
    generator = torch.Generator().manual_seed(0)
    packings = {"4x32": (4, 32), "1x128": (1, 128)} if options.tiny else {"16x1024": (16, 1024), "1x16384": (1, 16384)}
    works = [
        Workload(name, torch.randint(shape["vocab_size"], (count, length + 1), generator=generator))
        for name, (count, length) in packings.items()
    ]
    if not options.no_steps:
        with tempfile.TemporaryDirectory() as folder:
            results = compare(options, Path(folder), works, shape)
    print(f"\n{attention}")
    print_tables(results, works, shape)
    print(f"\ntorch {torch.__version__}, {torch.cuda.get_device_name() if on_gpu else 'CPU'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
