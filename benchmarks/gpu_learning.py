"""Does the recipe learn, at what speed, and does it go on after a kill? GSM8K's test set before, during and after.

    python benchmarks/gpu_learning.py --model MODEL --data data/gsm8k [--layout apart] -- [flags of train.py]

Runs scripts/run-qwen2.5-0.5B-gsm8k.sh, kills its driver with SIGKILL after --kill-after steps, gives the same command
line again at once, and prints what the run's own metrics say. The folder is kept: `slime report FOLDER` plots it.
A step counts for the times unless it is one of the first two after a start, evaluates, or writes a checkpoint.
"""

# ruff: noqa: E402 (the checkout is put on the path first)
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slime.observability.metric_names import STEP_PHASES
from slime.observability.report import summarise
from slime.observability.run_log import read_metrics

RECIPE = "scripts/run-qwen2.5-0.5B-gsm8k.sh"
SYNC_PARTS = ("pause", "gather", "send", "verify", "continue")
WORK = ("generate", "wait_for_rollout", "train")
START_S = 600.0


def main() -> int:
    options = _options()
    name = f"learning-{options.layout}"
    folder = Path(options.output_dir).resolve() / name
    if (folder / "metrics.jsonl").exists():
        raise SystemExit(f"{folder} holds a run already: give another --output-dir")
    command = [
        "bash", RECIPE, "--num-rollout", str(options.steps), "--save-interval", str(options.save_interval),
        "--async-save", "--eval-interval", str(options.eval_interval), "--output-dir", str(folder.parent),
        *options.flags,
    ]  # fmt: skip
    environment = os.environ | {
        "MODEL": str(Path(options.model).resolve()), "DATA": str(Path(options.data).resolve()),
        "LAYOUT": options.layout, "RUN_NAME": name, "PYTHON": sys.executable,
    }  # fmt: skip
    starts = [0]
    rows: list[tuple[str, str, str]] = []
    if options.kill_after:
        began = time.monotonic()
        run = _start(command, environment, folder)
        _wait_for_step(run, folder, options.kill_after - 1, began + START_S)
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed_after = max(_steps(folder))
    began = time.monotonic()
    run = _start(command, environment, folder)
    if options.kill_after:
        starts.append(_wait_for_line_after(run, folder, began))
        rows.append((f"SIGKILL after step {killed_after}", f"went on with step {starts[1]}", ""))
        rows.append(("the same command again: seconds to the end of its first step", _s(time.monotonic() - began), ""))
    if run.wait():
        raise SystemExit(f"the run ended with exit code {run.returncode}:\n{_log(folder).read_text()[-4000:]}")
    rows += _what_was_learned(folder) + _times(folder, starts)
    print(f"\n{' '.join(command)}\n\n| {name} | seen | wanted |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="HuggingFace folder")
    parser.add_argument("--data", required=True, help="folder with train.jsonl and test.jsonl (examples/gsm8k)")
    parser.add_argument("--layout", choices=("colocated", "apart", "async"), default="colocated")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--kill-after", type=int, default=70, help="steps, then SIGKILL; 0: no kill (default: 70)")
    parser.add_argument("--save-interval", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--eval-interval", type=int, default=50, help="steps between evaluations on the test set")
    parser.add_argument("--output-dir", default="runs", help="where the run's folder is made")
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    return parser.parse_args()


def _log(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def _start(command: list[str], environment: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """The recipe becomes the driver itself (`exec`), so that a signal to it is one to the driver."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _steps(folder: Path) -> list[int]:
    """Steps in the order in which they were done; one that a resumed run does again is there twice."""
    try:
        text = (folder / "metrics.jsonl").read_text()
    except OSError:
        return []
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return [line["step"] for line in lines if line["step"] >= 0 and "perf/step_time" in line]


def _wait_for_step(run: "subprocess.Popen[bytes]", folder: Path, step: int, deadline: float) -> None:
    while step not in (done := _steps(folder)):
        if run.poll() is not None:
            raise SystemExit(f"the run ended before step {step}:\n{_log(folder).read_text()[-4000:]}")
        if not done and time.monotonic() > deadline:
            raise SystemExit(f"no step within {START_S:.0f} s:\n{_log(folder).read_text()[-4000:]}")
        time.sleep(0.2)


def _wait_for_line_after(run: "subprocess.Popen[bytes]", folder: Path, began: float) -> int:
    """The first step that ends after `began` (time.monotonic)."""
    wall = time.time() - (time.monotonic() - began)
    while True:
        new = [line["step"] for line in read_metrics(folder) if line["step"] >= 0 and line["time"] > wall]
        if new:
            return int(new[0])
        if run.poll() is not None or time.monotonic() > began + START_S:
            raise SystemExit(f"no step after the kill:\n{_log(folder).read_text()[-4000:]}")
        time.sleep(0.2)


def _what_was_learned(folder: Path) -> list[tuple[str, str, str]]:
    summary = summarise(folder)
    curve = {
        line["step"]: line["eval/gsm8k_test"]
        for line in read_metrics(folder)
        if line.get("eval/gsm8k_test") is not None
    }
    rows = [
        (
            "GSM8K test, greedy" + (", before" if step < 0 else f", after step {step}"),
            f"{score:.1%}",
            "34 % (target 40 %)" if step == max(curve) else "",
        )
        for step, score in curve.items()
    ]
    if summary["reward_first"] is not None:
        rows.append(
            ("reward, first 3 and last 5 steps", f"{summary['reward_first']:.3f}, {summary['reward_last']:.3f}", "")
        )
    return rows


def _times(folder: Path, starts: list[int]) -> list[tuple[str, str, str]]:
    warm = {start + i for start in starts for i in range(2)}
    lines = [line for line in read_metrics(folder) if line["step"] >= 0]
    plain = [
        line for line in lines
        if line["step"] not in warm and not line.get("perf/eval_time") and not line.get("perf/save_time")
    ]  # fmt: skip
    if not plain:
        return [("times", "no step counts: too few steps", "")]
    rows = [("seconds a step, median", _s(_median(plain, "perf/step_time")), "6 (target 4)")]
    for phase in STEP_PHASES:
        if any(line.get(f"perf/{phase}_time") for line in plain):
            rows.append((f"- {phase}", _s(_median(plain, f"perf/{phase}_time")), ""))
    rows.append(("- not accounted for", _s(_median(plain, "perf/other_time")), "1 %"))
    outside = [line["perf/step_time"] - sum(line.get(f"perf/{work}_time") or 0.0 for work in WORK) for line in plain]
    share = statistics.median(o / line["perf/step_time"] for o, line in zip(outside, plain, strict=True))
    rows.append(("outside generation and training", f"{_s(statistics.median(outside))}, {share:.1%}", "0.6 s or 8 %"))
    parts = ", ".join(f"{part} {_median(plain, f'perf/update_weights_{part}_time'):.3f}" for part in SYNC_PARTS)
    rows.append(
        (
            "one weight sync with its proof",
            f"{_median(plain, 'perf/update_weights_time'):.3f} ({parts})",
            "0.15 s; 0.25 s apart",
        )
    )
    name = "train/train_rollout_logprob_abs_diff"
    differences = [line[name] for line in lines if name in line]
    rows.append(
        (
            "train - rollout log-prob, nat: mean, largest step",
            f"{statistics.fmean(differences):.2e}, {max(differences):.2e}",
            "3e-2",
        )
    )
    rows.append(("tokens/s of a training rank", f"{_median(plain, 'perf/actor_train_tok_per_s'):,.0f}", ""))
    for phase in ("eval", "save"):
        seconds = [line[f"perf/{phase}_time"] for line in lines if line.get(f"perf/{phase}_time")]
        if seconds:
            rows.append((f"{phase}, when it comes: median of {len(seconds)}", _s(statistics.median(seconds)), ""))
    return rows


def _median(lines: Iterable[dict[str, Any]], name: str) -> float:
    return statistics.median(line.get(name) or 0.0 for line in lines)


def _s(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
