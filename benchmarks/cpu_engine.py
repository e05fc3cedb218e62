"""Tokens per CPU-second of the embedded engine, beside transformers' generate and any other engine module.

    python benchmarks/cpu_engine.py --model-path DIR [--dtype bfloat16 float32] [--batch 1 16 64] [--against MODULE.py]

Each batch is made of prompts of --prompt-tokens random tokens, each shared by --group requests, and makes --new-tokens
tokens a request at temperature 1 with log-probs. Time is CPU time of this process, so that a busy machine disturbs
less; the ways take turns --repeats times and the best of each is shown. A module named with --against must have
`Engine(path, dtype)` with `run(requests)` and `Req(ids, max_new_tokens, ignore_eos)`.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from slime.backends.embedded.engine import Engine, EngineSettings, make_request
from slime.backends.embedded.model import DTYPES, ServedModel
from slime.backends.embedded.protocol import SamplingParams

Run = Callable[[list[list[int]], int], None]
"""Generates that many tokens for each prompt."""


def embedded(path: str, dtype: torch.dtype) -> Run:
    """This project's engine."""
    engine = Engine(ServedModel(path, dtype), EngineSettings(max_running_requests=64))

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


def other_module(file: str) -> Callable[[str, torch.dtype], Run]:
    """An engine of the interface that the module docstring names."""
    spec = importlib.util.spec_from_file_location("other_engine", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def build(path: str, dtype: torch.dtype) -> Run:
        engine = module.Engine(path, dtype=dtype)

        def run(prompts: list[list[int]], new_tokens: int) -> None:
            engine.run([module.Req(prompt, max_new_tokens=new_tokens, ignore_eos=True) for prompt in prompts])

        return run

    return build


def make_prompts(batch: int, group: int, length: int, vocab_size: int) -> list[list[int]]:
    """`batch` prompts of `length` tokens, `group` neighbours alike."""
    generator = torch.Generator().manual_seed(batch)
    drawn = [torch.randint(vocab_size, (length,), generator=generator).tolist() for _ in range(-(-batch // group))]
    return [drawn[index // group] for index in range(batch)]


def main() -> None:
    """Measure and print one line a dtype, batch and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder in HuggingFace format")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=sorted(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="requests that share a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="MODULE.py", help="another engine to measure beside")
    parser.add_argument("--no-transformers", action="store_true", help="leave transformers' generate out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with open(os.path.join(arguments.model_path, "config.json")) as file:
        vocab_size = json.load(file)["vocab_size"]
    builders: dict[str, Callable[[str, torch.dtype], Run]] = {"embedded": embedded}
    if not arguments.no_transformers:
        builders["transformers"] = transformers_generate
    if arguments.against:
        builders[os.path.basename(arguments.against)] = other_module(arguments.against)
    for dtype in arguments.dtype:
        ways = {name: build(arguments.model_path, DTYPES[dtype]) for name, build in builders.items()}
        for batch in arguments.batch:
            measure(
                ways, dtype, batch, make_prompts(batch, arguments.group, arguments.prompt_tokens, vocab_size), arguments
            )


def measure(ways: dict[str, Run], dtype: str, batch: int, prompts: list[list[int]], arguments: Any) -> None:
    """Let the ways take turns and print the best tokens per CPU-second of each."""
    best = dict.fromkeys(ways, 0.0)
    for run in ways.values():
        run(prompts, 2)
    for _ in range(arguments.repeats):
        for name, run in ways.items():
            start = time.process_time()
            run(prompts, arguments.new_tokens)
            best[name] = max(best[name], batch * arguments.new_tokens / (time.process_time() - start))
    for name, value in best.items():
        share = value / best["embedded"]
        print(f"{dtype:9} batch {batch:3}  {name:24} {value:7.1f} tokens/CPU-s  ({share:.2f} of embedded)", flush=True)


if __name__ == "__main__":
    main()
