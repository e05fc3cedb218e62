"""Tokens per second of a rollout through slime, beside SGLang's own serving benchmark on the same server and requests.

    python benchmarks/gpu_rollout.py --model MODEL --prompts data/gsm8k/train.jsonl

slime's rollouts have everything on: chat template, router, log-probs, rewards, samples on disk. After each one
`sglang.bench_serving` sends its requests, prompt for prompt, to the same engine without the router; so what else the
machine does, and how warm the engine is, are the same for all. Each response has exactly --tokens tokens. The first
rounds (--warm-up) do not count.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from slime.backends.sglang.launch import PYTHON_VARIABLE

_TIMEOUT_S = 300
"""For the benchmark's first run, its imports included."""

_WAYS = {
    "bench_serving, streaming": [],
    "bench_serving, whole replies with log-probs": ["--disable-stream", "--return-logprob"],
}
_BENCHMARK = """
import json, runpy, sys
for line in sys.stdin:
    sys.argv = ["bench_serving", *json.loads(line)]
    runpy.run_module("sglang.bench_serving", run_name="__main__")
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["train.py", *_flags(options, folder)]
        from slime.arguments import parse_args
        from slime.ray.run import Run

        args = parse_args()
        speeds: dict[str, list[float]] = {"slime, everything on": [], **{way: [] for way in _WAYS}}
        with Run(args) as run:
            (engine,) = run._ask("engine_records", what="list its engines")
            bench = _Bench(options, args, engine.url)
            try:
                for rollout_id in range(args.num_rollout):
                    speeds["slime, everything on"].append(_rollout(run, rollout_id))
                    requests = bench.requests(rollout_id)
                    for way, flags in _WAYS.items():
                        speeds[way].append(bench.speed(requests, flags))
            finally:
                bench.close()
    _print_table(options, speeds)


def _options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and `label`")
    parser.add_argument("--tokens", type=int, default=400, help="of each response")
    parser.add_argument("--batch", type=int, default=32, help="prompts a rollout")
    parser.add_argument("--samples", type=int, default=8, help="responses a prompt")
    parser.add_argument("--rollouts", type=int, default=8, help="that count")
    parser.add_argument("--warm-up", type=int, default=2, help="rollouts that do not count")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    return parser.parse_args()


def _flags(options: Namespace, folder: str) -> list[str]:
    return [
        "--hf-checkpoint", options.model, "--debug-rollout-only", "--rollout-num-gpus", "1", "--num-gpus-per-node", "1",
        "--prompt-data", options.prompts, "--input-key", "prompt", "--label-key", "label", "--apply-chat-template",
        "--rm-type", "math", "--num-rollout", str(options.warm_up + options.rollouts),
        "--rollout-batch-size", str(options.batch), "--n-samples-per-prompt", str(options.samples),
        "--rollout-max-response-len", str(options.tokens),
        "--custom-generate-function-path", str(Path(__file__).parent / "exact_length.py:generate"),
        "--sglang-cuda-graph-max-bs-decode", str(options.batch * options.samples), "--output-dir", folder,
        "--run-name", "rollout", *options.flags,
    ]  # fmt: skip


def _rollout(run: Any, rollout_id: int) -> float:
    """Response tokens per second of the whole generate phase, as the trainer would wait for it."""
    with run.step(rollout_id):
        run.generate(rollout_id)
    line = json.loads((Path(run.args.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    return float(sum(row["response_length"] for row in _samples(run.args, rollout_id)) / line["perf/generate_time"])


def _samples(args: Namespace, rollout_id: int) -> list[dict[str, Any]]:
    path = Path(args.run_dir) / "samples" / f"rollout_{rollout_id:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


class _Bench:
    """SGLang's benchmark, in one process for all of its runs: importing it takes longer than a rollout."""

    def __init__(self, options: Namespace, args: Namespace, url: str) -> None:
        self._args, self._folder = args, Path(args.run_dir)
        self._num_requests = options.batch * options.samples
        self._result, self._log = self._folder / "bench.jsonl", self._folder / "bench.log"
        self._flags = [
            "--backend", "sglang", "--base-url", url, "--model", options.model, "--dataset-name", "custom",
            "--num-prompts", str(self._num_requests), "--sharegpt-output-len", str(options.tokens),
            "--flush-cache", "--disable-tqdm", "--output-file", str(self._result),
        ]  # fmt: skip
        python = os.environ.get(PYTHON_VARIABLE) or sys.executable
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-c", _BENCHMARK], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def requests(self, rollout_id: int) -> Path:
        """The file of a rollout's requests, as the benchmark reads them."""
        path = self._folder / f"requests_{rollout_id}.jsonl"
        turns = [
            [{"content": row["prompt"]}, {"content": "an answer, whose length is not used"}]
            for row in _samples(self._args, rollout_id)
        ]
        path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
        return path

    def speed(self, requests: Path, flags: list[str]) -> float:
        """Output tokens per second that the benchmark reports for these requests, all sent at once."""
        before = len(self._results())
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told below
            self._process.stdin.write(json.dumps([*self._flags, "--dataset-path", str(requests), *flags]) + "\n")
            self._process.stdin.flush()
        deadline = time.monotonic() + _TIMEOUT_S
        while len(results := self._results()) == before:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"sglang.bench_serving gave no result:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.1)
        if results[-1]["completed"] != self._num_requests:
            raise SystemExit(f"sglang.bench_serving completed {results[-1]['completed']} of {self._num_requests}.")
        return float(results[-1]["output_throughput"])

    def _results(self) -> list[dict[str, Any]]:
        """Of whole lines: the last one may be on its way."""
        text = self._result.read_text() if self._result.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _print_table(options: Namespace, speeds: dict[str, list[float]]) -> None:
    print(
        f"\n{options.batch} prompts x {options.samples} samples x {options.tokens} tokens, {options.rollouts} rollouts"
    )
    print("| way | tokens/s, median | all | slime / this: of medians | median of rounds |\n|---|---|---|---|---|")
    ours, *_ = (counted[options.warm_up :] for counted in speeds.values())
    for way, all_speeds in speeds.items():
        these = all_speeds[options.warm_up :]
        median = statistics.median(these)
        everything = " ".join(f"{speed:,.0f}" for speed in these)
        by_round = statistics.median(our / their for our, their in zip(ours, these, strict=True))
        print(f"| {way} | {median:,.0f} | {everything} | {statistics.median(ours) / median:.3f} | {by_round:.3f} |")


if __name__ == "__main__":
    main()
