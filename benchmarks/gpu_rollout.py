"""Tokens per second of a rollout through slime, beside SGLang's own serving benchmark on the same server and requests.

    python benchmarks/gpu_rollout.py --model MODEL --prompts data/gsm8k/train.jsonl

slime's rollouts have everything on: chat template, router, log-probs, rewards, samples on disk. Then
`sglang.bench_serving` sends the requests of each rollout, prompt for prompt, to the same engine without the router.
Each response has exactly --tokens tokens. The first rollout and the first benchmark warm up and do not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from slime.backends.sglang.launch import PYTHON_VARIABLE

_TIMEOUT_S = 900
_BENCHMARK = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = ["bench_serving", *words]
    runpy.run_module("sglang.bench_serving", run_name="__main__")
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", *_flags(options, folder)]
        from slime.arguments import parse_args
        from slime.ray.run import Run

        args = parse_args()
        with Run(args) as run:
            ours = [_rollout(run, rollout_id) for rollout_id in range(options.rollouts + 1)]
            (engine,) = run._ask("engine_records", what="list its engines")
            ways = {
                "bench_serving, streaming": [],
                "bench_serving, whole replies with log-probs": ["--disable-stream", "--return-logprob"],
            }
            theirs = _bench(options, args, engine.url, ways)
    _print_table(options, ours, theirs)


def _options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and `label`")
    parser.add_argument("--tokens", type=int, default=400, help="of each response")
    parser.add_argument("--batch", type=int, default=32, help="prompts a rollout")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--rollouts", type=int, default=4, help="that count")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    return parser.parse_args()


def _flags(options: Namespace, folder: str) -> list[str]:
    return [
        "--hf-checkpoint", options.model, "--debug-rollout-only", "--rollout-num-gpus", "1", "--num-gpus-per-node", "1",
        "--prompt-data", options.prompts, "--input-key", "prompt", "--label-key", "label", "--apply-chat-template",
        "--rm-type", "math", "--num-rollout", str(options.rollouts + 1), "--rollout-batch-size", str(options.batch),
        "--n-samples-per-prompt", str(options.samples), "--rollout-max-response-len", str(options.tokens),
        "--custom-generate-function-path", str(Path(__file__).parent / "exact_length.py:generate"),
        "--sglang-cuda-graph-max-bs-decode", str(options.batch * options.samples), "--output-dir", folder,
        "--run-name", "rollout", *options.flags,
    ]  # fmt: skip


def _rollout(run: Any, rollout_id: int) -> float:
    """Response tokens per second of the whole generate phase, as the trainer would wait for it."""
    with run.step(rollout_id):
        run.generate(rollout_id)
    line = json.loads((Path(run.args.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    return sum(row["response_length"] for row in _samples(run.args, rollout_id)) / line["perf/generate_time"]


def _samples(args: Namespace, rollout_id: int) -> list[dict[str, Any]]:
    path = Path(args.run_dir) / "samples" / f"rollout_{rollout_id:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def _bench(options: Namespace, args: Namespace, url: str, ways: dict[str, list[str]]) -> dict[str, list[float]]:
    """Output tokens per second that SGLang's benchmark reports for each rollout's requests, all sent at once, by way.

    One process runs it for all of them: importing it takes longer than a rollout.
    """
    folder = Path(args.run_dir)
    calls, result = [], folder / "bench.jsonl"
    for rollout_id in range(options.rollouts + 1):
        rows, requests = _samples(args, rollout_id), folder / f"requests_{rollout_id}.jsonl"
        turns = [[{"content": row["prompt"]}, {"content": "an answer, whose length is not used"}] for row in rows]
        requests.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
        calls += [
            [
                "--backend", "sglang", "--base-url", url, "--model", options.model, "--dataset-name", "custom",
                "--dataset-path", str(requests), "--num-prompts", str(len(rows)), "--sharegpt-output-len",
                str(options.tokens), "--flush-cache", "--disable-tqdm", "--output-file", str(result), *flags,
            ]
            for flags in ways.values()
        ]  # fmt: skip
    python = os.environ.get(PYTHON_VARIABLE) or sys.executable
    command = [python, "-c", _BENCHMARK, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    speeds = (
        [json.loads(line)["output_throughput"] for line in result.read_text().splitlines()] if result.exists() else []
    )
    if done.returncode or len(speeds) != len(calls):
        raise SystemExit(
            f"sglang.bench_serving ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )
    return {way: speeds[i :: len(ways)] for i, way in enumerate(ways)}


def _print_table(options: Namespace, ours: list[float], theirs: dict[str, list[float]]) -> None:
    print(
        f"\n{options.batch} prompts x {options.samples} samples x {options.tokens} tokens, {options.rollouts} rollouts"
    )
    print("| way | tokens/s, median | all | slime / this |\n|---|---|---|---|")
    slime = statistics.median(ours[1:])
    for way, speeds in {"slime, everything on": ours, **theirs}.items():
        median = statistics.median(speeds[1:])
        everything = " ".join(f"{speed:,.0f}" for speed in speeds[1:])
        print(f"| {way} | {median:,.0f} | {everything} | {slime / median:.3f} |")


if __name__ == "__main__":
    main()
