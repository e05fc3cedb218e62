"""What determinism costs: tokens per CPU-second of the embedded engine with and without it, in one run.

    python benchmarks/cpu_deterministic.py --model-path DIR [--dtype bfloat16 float32] [--batch 1 16 64]

Two engines over two copies of the model take turns --repeats times on the same requests (random prompts, each shared
by --group requests, temperature 1, log-probs); the median of each and their ratio are shown. Time is CPU time of this
process. Says also how long the proof at start-up took, and where products need padding.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from slime.backends.embedded.deterministic import TRIED_ROWS, SteadyMatrix
from slime.backends.embedded.engine import Engine, EngineSettings, make_request
from slime.backends.embedded.linear import StackedLinear
from slime.backends.embedded.model import DTYPES, ServedModel
from slime.backends.embedded.protocol import SamplingParams


def generate(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    """CPU-seconds that the engine takes for `new_tokens` tokens after each prompt."""
    start = time.process_time()
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(sampling_seed=index, ignore_eos=True)
        engine.scheduler.add(
            make_request(
                engine,
                rid=str(index),
                prompt=prompt,
                sampling=sampling,
                max_new_tokens=new_tokens,
                wants_log_probs=True,
            )
        )
    engine.run_until_idle()
    return time.process_time() - start


def padded_products(engine: Engine) -> str:
    """Which products are computed with more rows than asked."""
    shapes = {}
    for module in engine.model.module.modules():
        if isinstance(module, StackedLinear) and isinstance(module.matrix, SteadyMatrix):
            shapes[sum(module.sizes), module.in_features] = module.matrix.sizes
    padded = [
        f"{n} x {k}: " + ", ".join(f"{rows} as {sizes[rows]}" for rows in TRIED_ROWS if sizes[rows] != rows)
        for (n, k), sizes in shapes.items()
        if any(sizes[rows] != rows for rows in TRIED_ROWS)
    ]
    return "; ".join(padded) or "none"


def main() -> None:
    """Measure and print one line a dtype and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder in HuggingFace format")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=38)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="requests that share a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with open(os.path.join(arguments.model_path, "config.json")) as file:
        vocab_size = json.load(file)["vocab_size"]
    for dtype in arguments.dtype:
        fast, steady = (ServedModel(arguments.model_path, DTYPES[dtype]) for _ in range(2))
        start = time.process_time()
        engines = [
            Engine(fast, EngineSettings(context_length=2048)),
            Engine(steady, EngineSettings(context_length=2048, deterministic=True)),
        ]
        proof = time.process_time() - start
        print(f"{dtype}: proof at start-up {proof:.1f} CPU-s; rows padded in products: {padded_products(engines[1])}")
        print(f"{'dtype':9} {'batch':>5} {'plain tok/CPU-s':>16} {'deterministic':>14} {'ratio':>6}")
        for batch in arguments.batch:
            generator = torch.Generator().manual_seed(batch)
            drawn = torch.randint(
                vocab_size, (-(-batch // arguments.group), arguments.prompt_tokens), generator=generator
            )
            prompts = [drawn[index // arguments.group].tolist() for index in range(batch)]
            seconds: list[list[float]] = [[], []]
            for engine in engines:
                generate(engine, prompts, 2)
            for _ in range(arguments.repeats):
                for taken, engine in zip(seconds, engines, strict=True):
                    taken.append(generate(engine, prompts, arguments.new_tokens))
            plain, deterministic = (batch * arguments.new_tokens / statistics.median(taken) for taken in seconds)
            print(f"{dtype:9} {batch:5} {plain:16.1f} {deterministic:14.1f} {deterministic / plain:6.2f}", flush=True)


if __name__ == "__main__":
    main()
