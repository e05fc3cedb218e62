"""What taking turns on one GPU costs and gives: memory left by a sleeping engine and a sleeping trainer, and seconds.

    python benchmarks/gpu_sleep.py --model MODEL --prompts data/gsm8k/train.jsonl

A colocated run with --offload; memory is what nvidia-smi says, by process where the machine tells.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt` and `label`")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = [
            "train.py", "--hf-checkpoint", options.model, "--prompt-data", options.prompts, "--input-key", "prompt",
            "--label-key", "label", "--apply-chat-template", "--rm-type", "random", "--num-rollout", str(options.steps),
            "--rollout-batch-size", "32", "--n-samples-per-prompt", "8", "--rollout-max-response-len", "400",
            "--num-steps-per-rollout", "1", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "16384",
            "--advantage-estimator", "grpo", "--lr", "1e-6", "--colocate", "--offload", "--actor-num-gpus-per-node",
            "1", "--num-gpus-per-node", "1", "--output-dir", folder, "--run-name", "sleep",
            "--sglang-cuda-graph-max-bs-decode", "256", *options.flags,
        ]  # fmt: skip
        seen, lines = _run(folder)
    print("\n| moment | GPU memory, GiB | by process |\n|---|---|---|")
    for moment, values in seen.items():
        print(f"| {moment} | {max(total for total, _ in values) / 1024:.2f} | {values[-1][1]} |")
    print("\n| phase | seconds a step, median |\n|---|---|")
    for name in sorted({key for line in lines for key in line if key.startswith("perf/") and key.endswith("_time")}):
        if name.count("_") == 1:
            print(f"| {name} | {statistics.median(line.get(name, 0.0) for line in lines):.3f} |")


def _run(folder: str) -> tuple[dict[str, list[tuple[int, str]]], list[dict[str, float]]]:
    from slime.arguments import parse_args
    from slime.ray.run import Run

    seen: dict[str, list[tuple[int, str]]] = {}

    def look(moment: str) -> None:
        seen.setdefault(moment, []).append(_gpu_memory())

    with Run(parse_args()) as run:
        for rollout_id in run.schedule:
            with run.step(rollout_id):
                shards: Any = run.generate(rollout_id)
                look("engine awake, trainer asleep")
                run._turns.to_loading(run._clock)
                look("both asleep")
                run.train(rollout_id, shards)
                look("engine asleep, trainer awake")
                run.sync()
    metrics = (Path(folder) / "sleep" / "metrics.jsonl").read_text().splitlines()
    return seen, [line for line in map(json.loads, metrics) if line["step"] >= 1]


def _gpu_memory() -> tuple[int, str]:
    """MiB in use, and by process where nvidia-smi may say so."""
    query = ["nvidia-smi", "--format=csv,noheader,nounits", "-i", os.environ.get("CUDA_VISIBLE_DEVICES", "0")]
    total = subprocess.run([*query, "--query-gpu=memory.used"], capture_output=True, text=True, check=True).stdout
    apps = subprocess.run([*query, "--query-compute-apps=name,used_memory"], capture_output=True, text=True, check=True)
    return int(total.split()[0]), "; ".join(apps.stdout.split("\n")).strip("; ")


if __name__ == "__main__":
    main()
