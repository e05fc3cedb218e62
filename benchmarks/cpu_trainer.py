"""CPU-seconds of one training step of the Megatron trainer, beside transformers on the same tokens with the same loss.

    python benchmarks/cpu_trainer.py --model-path FOLDER [--dtype bf16 fp32] [--repeats 5]

Two workloads of random tokens, mean negative log-likelihood over the tokens that count:

    all    4 sequences, together a row of 2,048 positions; every position has a loss on both sides
    half   16 sequences of 128, the second half of each is a response and has a loss; transformers computes its usual
           logits of all positions

Our side is the trainer as a run builds it: the flags of train.py through `MegatronTrainer`, one rank, its packing, its
gradient buffers. Their side is `AutoModelForCausalLM` with sdpa attention in the same dtype, one padding-free batch.
Timed are forward and backward, and apart from them the optimizer (ours: Megatron's, which clips and keeps float32 main
weights and states; theirs: clip_grad_norm_ and fused AdamW on the model's own weights and states in its dtype).
CPU time of this process, one thread; the two sides take turns and each figure is a median.
"""

# ruff: noqa: E402 (environment and path are set before torch and slime are imported)
import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from slime.arguments import parse_args
from slime.backends.megatron.trainer import MegatronTrainer
from slime.data.batch import split_train_data_by_dp
from slime.models.shape import read_config
from slime.utils.processes import free_port

LIMITS = {"all": 1.05, "half": 0.8}
"""The most that our time may be of theirs."""


@dataclass(frozen=True)
class Workload:
    """Sequences that are trained in one step.

    Attributes:
        tokens: [B, S] token ids.
        num_prompt: tokens of each sequence that have no loss.
        has_all_losses: whether the last token of each sequence is only a target, so that every position of the row
            has a loss.
    """

    name: str
    tokens: Tensor
    num_prompt: int
    has_all_losses: bool


def workloads(vocab_size: int, num_positions: int) -> list[Workload]:
    """`all` and `half`, for rows of `num_positions`."""
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, columns: int) -> Tensor:
        return torch.randint(vocab_size, (rows, columns), generator=generator)

    length = num_positions // 16
    return [
        Workload("all", drawn(4, num_positions // 4 + 1), 1, True),
        Workload("half", drawn(16, length), length // 2, False),
    ]


@dataclass(frozen=True)
class Side:
    """One way of training: `loss_and_gradients()` gives the loss, `optimizer_step()` applies the gradients."""

    loss_and_gradients: Callable[[], float]
    optimizer_step: Callable[[], None]


def run_args(model_path: str, dtype: str, num_positions: int, folder: Path) -> Namespace:
    """What train.py would make of the command line of such a run."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt": "never read", "label": "0"}\n')
    args = parse_args(
        [
            *("--hf-checkpoint", model_path, "--prompt-data", str(prompts), "--input-key", "prompt"),
            *("--output-dir", str(folder), "--run-name", "benchmark", "--device", "cpu"),
            *("--loss-type", "sft_loss", "--disable-compute-advantages-and-returns", "--calculate-per-token-loss"),
            *("--num-rollout", "1", "--rollout-batch-size", "1", "--n-samples-per-prompt", "1"),
            *("--rollout-max-response-len", "1", "--rm-type", "random", "--lr", "1e-6"),
            *("--colocate", "--actor-num-nodes", "1", "--actor-num-gpus-per-node", "1", "--num-gpus-per-node", "1"),
            *("--use-dynamic-batch-size", "--max-tokens-per-gpu", str(2 * num_positions)),
            "--bf16" if dtype == "bf16" else "--no-bf16",
        ]
    )
    args.train_threads = 1
    return args


class OurTrainer:
    """The trainer of a run, asked for one step in its two parts."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._trainer = MegatronTrainer(args, 0, 1, "127.0.0.1", free_port("127.0.0.1"))
        self._trainer.init()

    def side(self, work: Workload) -> Side:
        from slime.algorithm.loss import get_loss_function
        from slime.backends.megatron import optimizer as optimizers
        from slime.backends.megatron.microbatches import Packer, local_rollout, train_steps
        from slime.backends.megatron.passes import forward_backward, step_metrics

        args, job = self._args, self._trainer.job
        packer = Packer(args, job.parallel_config, torch.device("cpu"))
        loss_function = get_loss_function(args)
        data = local_rollout(self._shard(work))
        (step,) = train_steps(data)

        def loss_and_gradients() -> float:
            for model in job.models:
                model.zero_grad_buffer()
            job.optimizer.zero_grad()
            records = forward_backward(args, job.models, packer, data, step, loss_function)
            return step_metrics(args, records, step)["loss"]

        def optimizer_step() -> None:
            assert optimizers.step(job.optimizer).is_applied

        return Side(loss_and_gradients, optimizer_step)

    def _shard(self, work: Workload) -> dict[str, Any]:
        num_samples, length = work.tokens.shape
        response = length - work.num_prompt
        rollout = {
            "tokens": work.tokens.tolist(),
            "response_lengths": [response] * num_samples,
            "rewards": [0.0] * num_samples,
            "raw_reward": [0.0] * num_samples,
            "truncated": [0] * num_samples,
            "sample_indices": list(range(num_samples)),
            "group_indices": list(range(num_samples)),
            "rollout_ids": list(range(num_samples)),
            "loss_masks": [[1] * response] * num_samples,
            "rollout_mask_sums": [response] * num_samples,
        }
        args = Namespace(**{**vars(self._args), "global_batch_size": num_samples})
        (shard,) = split_train_data_by_dp(args, rollout, self._trainer.job.parallel_config)
        return shard

    def close(self) -> None:
        self._trainer.close()


class TransformersModel:
    """transformers' own model, loss and a plain training step."""

    def __init__(self, model_path: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, attn_implementation="sdpa")
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, fused=True)

    def side(self, work: Workload) -> Side:
        targets = work.tokens.clone()
        targets[:, : work.num_prompt] = -100
        inputs: dict[str, Tensor] = {"input_ids": work.tokens, "labels": targets}
        if work.has_all_losses:  # labels that are shifted already: no position is lost at the end
            shifted = targets[:, 1:].contiguous()
            inputs = {"input_ids": work.tokens[:, :-1], "labels": shifted, "shift_labels": shifted}

        def loss_and_gradients() -> float:
            self._optimizer.zero_grad(set_to_none=True)
            loss = self._model(**inputs, use_cache=False).loss
            loss.backward()
            return float(loss.detach())

        def optimizer_step() -> None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()

        return Side(loss_and_gradients, optimizer_step)


def measure(sides: dict[str, Side], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Median CPU-seconds of (forward and backward, optimizer) of each side, taking turns, and each side's first loss.

    The first turn is not counted: it fills caches and makes the optimizer's states.
    """
    losses: dict[str, float] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            gc.collect()
            start = time.process_time()
            loss = side.loss_and_gradients()
            middle = time.process_time()
            side.optimizer_step()
            end = time.process_time()
            losses.setdefault(name, loss)
            if turn:
                seconds[name].append((middle - start, end - middle))
    medians = {name: [statistics.median(part) for part in zip(*turns, strict=True)] for name, turns in seconds.items()}
    return medians, losses


def main() -> int:
    """Measure and print one line a dtype and workload; the exit code is 1 if a bf16 ratio is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder in HuggingFace format")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the median is taken")
    parser.add_argument("--positions", type=int, default=2048, help="of the row; a multiple of 32")
    parser.add_argument("--workload", nargs="+", choices=sorted(LIMITS), default=sorted(LIMITS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"megatron\.")
    vocab_size = int(read_config(options.model_path)["vocab_size"])
    rows = []
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as folder:
            args = run_args(options.model_path, dtype, options.positions, Path(folder))
            ours = OurTrainer(args)
            theirs = TransformersModel(options.model_path, torch.bfloat16 if args.bf16 else torch.float32)
            for work in workloads(vocab_size, options.positions):
                if work.name in options.workload:
                    medians, losses = measure({"ours": ours.side(work), "theirs": theirs.side(work)}, options.repeats)
                    rows.append((dtype, work.name, medians, losses))
            ours.close()
    print_table(rows, options.repeats)
    is_over = [
        medians["ours"][0] > LIMITS[name] * medians["theirs"][0] for dtype, name, medians, _ in rows if dtype == "bf16"
    ]
    return int(any(is_over))


def print_table(rows: list[tuple[str, str, dict[str, list[float]], dict[str, float]]], repeats: int) -> None:
    """One line a dtype and workload."""
    print(f"CPU-seconds, one thread, median of {repeats}; ratio = ours / transformers, forward and backward")
    columns = ["dtype", "loss on", "slime", "transformers", "ratio", "limit"]
    columns += ["Adam: slime", "transformers", "loss: slime", "transformers"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for dtype, name, medians, losses in rows:
        (ours, our_adam), (theirs, their_adam) = medians["ours"], medians["theirs"]
        print(
            f"| {dtype} | {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {LIMITS[name]} | {our_adam:.2f} "
            f"| {their_adam:.2f} | {losses['ours']:.4f} | {losses['theirs']:.4f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
