"""What the quick start did: reward and held-out accuracy at both ends, what it cost, and where everything lies.

Run it: `python examples/quickstart/report.py RUN_DIR`. It reads only what every run of slime leaves in its folder
(metrics.jsonl, samples/) and cost.json, which scripts/cpu_time.py wrote.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from slime.observability.report import summarise

TASK = "held_out"


def answers(samples: Path) -> list[str]:
    """The last number of each response in a samples file; "" where there is none."""
    responses = (json.loads(line)["response"] for line in samples.read_text(encoding="utf-8").splitlines())
    return [numbers[-1] if (numbers := re.findall(r"-?\d+", text)) else "" for text in responses]


def evaluation_lines(run_dir: Path, evaluation: dict[str, float]) -> list[str]:
    files = {step: eval_file(run_dir, int(evaluation[f"{step}_step"])) for step in ("first", "last")}
    given = {step: answers(path) for step, path in files.items() if path.is_file()}
    lines = [
        f"held-out accuracy  {evaluation['first']:.3f} before training -> {evaluation['last']:.3f} after it (greedy)"
    ]
    if len(given) == 2:
        first, last = (len(set(given[step]) - {""}) for step in ("first", "last"))
        lines.append(f"                   {len(given['last'])} prompts; distinct answers {first} -> {last}")
    return lines


def eval_file(run_dir: Path, step: int) -> Path:
    number = f"{step:06d}" if step >= 0 else "initial"
    return run_dir / "samples" / f"eval_{number}_{TASK}.jsonl"


def cost_lines(run_dir: Path, set_up_wall_s: float, set_up_cpu_s: float) -> list[str]:
    path = run_dir / "cost.json"
    if not path.is_file():
        return []
    cost: dict[str, Any] = json.loads(path.read_text())
    most = list(cost["by_name_s"].items())[:6]
    return [
        f"wall time          {set_up_wall_s + cost['wall_s']:.0f} s: set-up and data {set_up_wall_s:.0f}, "
        f"train.py {cost['wall_s']:.0f}",
        f"CPU time           {set_up_cpu_s + cost['cpu_s']:.0f} s: set-up and data {set_up_cpu_s:.0f}, "
        f"train.py and all its processes {cost['cpu_s']:.0f}",
        "                   " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in most),
    ]


def place_lines(run_dir: Path) -> list[str]:
    places = {
        "curves": f".venv/bin/tensorboard --logdir {run_dir.parent}",
        "metrics": f"{run_dir}/metrics.jsonl (names: docs/metrics.md)",
        "samples": f"{run_dir}/samples/",
        "logs": f"{run_dir}/logs/",
    }
    if (run_dir / "hf" / "config.json").is_file():
        places["trained model"] = f"{run_dir}/hf (a HuggingFace folder)"
    return [f"{name:18} {place}" for name, place in places.items()]


NEXT = """try next
  bash scripts/quickstart.sh --rollout-seed 7                        the same with other samples
  bash scripts/quickstart.sh --advantage-estimator gspo              another algorithm
  .venv/bin/slime plot RUN [RUN ...] --out curves.png                curves of several runs (pip install matplotlib)
  docs/quickstart.md                                                 your own prompts and your own reward"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Summarise a run of the quick start.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--set-up-wall-s", type=float, default=0.0)
    parser.add_argument("--set-up-cpu-s", type=float, default=0.0)
    args = parser.parse_args()
    summary = summarise(args.run_dir)
    lines = [f"--- {args.run_dir}: {summary['steps']} steps"]
    if summary["reward_gain"] is not None:
        lines.append(
            f"reward             {summary['reward_first']:.3f} in the first 3 steps -> "
            f"{summary['reward_last']:.3f} in the last 5 (sampled)"
        )
    if TASK in summary["eval"]:
        lines += evaluation_lines(args.run_dir, summary["eval"][TASK])
    lines += cost_lines(args.run_dir, args.set_up_wall_s, args.set_up_cpu_s)
    print("\n".join([*lines, "", *place_lines(args.run_dir), "", NEXT]))


if __name__ == "__main__":
    main()
