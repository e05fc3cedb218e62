"""CPU-seconds of a whole GRPO step, over all processes of a run of train.py: how many, in which phase, by whom.

    python benchmarks/cpu_step.py --model-path FOLDER [--steps 3] [-- extra train.py flags]

Each step: 8 prompts of 38 tokens x 8 samples of exactly 64 new tokens, one optimizer step, all engines given the new
weights with proof, rewards, log. One device, on which trainer and engine take turns, one thread each. Nothing is left
out of the run; this program only watches: it follows status.json, and at each change of phase reads from /proc what
every process that came out of train.py has used. The first step is not counted. CPU time is in ticks of 10 ms.

Prints completion tokens per CPU-second over the counted steps, a table of phases and processes, and which share of the
CPU time lies in a named phase and a named process.
"""

# ruff: noqa: E402 (the checkout and its scripts are put on the path first)
import argparse
import itertools
import json
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from cpu_time import Family, run

from slime.observability.run_log import read_metrics
from slime.observability.run_status import STATUS_FILE

NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 38, 64
LOOK_EVERY_S = 0.02
PAUSE_S = 1.0
TOKENS_PER_CPU_S = 70.0
"""At least so many; TRL 1.16 made 36.6 of the same work (see benchmarks/README.md)."""

Processes = dict[tuple[int, int], float]
"""CPU-seconds of each process by (pid, start time)."""


@dataclass(frozen=True)
class Edge:
    """What everybody had used when a phase began."""

    phase: str
    rollout_id: int | None
    used_s: Processes
    total_s: float
    """All of it, processes that lived between two looks included."""


class PhaseWatch:
    """Notices when a run's status.json says another phase, and what its processes had used by then."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / STATUS_FILE
        self._seen = 0
        self.edges: list[Edge] = []
        self.names: dict[int, str] = {}
        """By pid, as status.json calls them."""

    def pause(self, family: Family) -> None:
        """A second of watching."""
        until = time.monotonic() + PAUSE_S
        while time.monotonic() < until:
            time.sleep(LOOK_EVERY_S)
            self.look(family)

    def look(self, family: Family) -> None:
        """Note the edge if there is one."""
        try:
            changed = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed == self._seen:
            return
        self._seen = changed
        status = json.loads(self._path.read_text())
        self.names |= {process["pid"]: process["name"] for process in status["processes"]}
        phase, rollout_id = status["phase"], status["rollout_id"]
        if not self.edges or (phase, rollout_id) != (self.edges[-1].phase, self.edges[-1].rollout_id):
            family.look()
            used = {key: process.own_s for key, process in family.members.items()}
            self.edges.append(Edge(phase, rollout_id, used, family.total_s()))


@dataclass(frozen=True)
class Breakdown:
    """CPU-seconds of the counted steps.

    Attributes:
        cells: by (phase, process).
        total_s: of all processes in these steps.
        num_steps: how many were counted.
    """

    cells: dict[tuple[str, str], float]
    total_s: float
    num_steps: int

    def phase_s(self, phase: str) -> float:
        return sum(seconds for (cell_phase, _), seconds in self.cells.items() if cell_phase == phase)

    def process_s(self, process: str) -> float:
        return sum(seconds for (_, cell_process), seconds in self.cells.items() if cell_process == process)

    @property
    def accounted(self) -> float:
        """Share of `total_s` that is in the table."""
        return sum(self.cells.values()) / self.total_s

    @property
    def working(self) -> float:
        """Share of `total_s` in generation and training."""
        return (self.phase_s("generate") + self.phase_s("train")) / self.total_s


def breakdown(edges: Sequence[Edge], names: dict[tuple[int, int], str], first_step: int) -> Breakdown:
    """Add up what each process used between the edges of the steps from `first_step` on.

    Args:
        edges: in order; the steps end where the phase "save" or "done" of the end of the run, or the last edge, is.
        names: of every process.
        first_step: the first rollout that counts.
    """
    counted = [
        (edge, after)
        for edge, after in itertools.pairwise(edges)
        if edge.rollout_id is not None and edge.rollout_id >= first_step and edge.phase != "done"
    ]
    cells: dict[tuple[str, str], float] = defaultdict(float)
    for edge, after in counted:
        for key, used_s in after.used_s.items():
            if (seconds := used_s - edge.used_s.get(key, 0.0)) > 0:
                cells[edge.phase, names[key]] += seconds
    num_steps = len({edge.rollout_id for edge, _ in counted})
    return Breakdown(dict(cells), sum(after.total_s - edge.total_s for edge, after in counted), num_steps)


def write_prompts(model_path: str, path: Path, count: int) -> None:
    """Distinct prompts that the model's tokenizer turns into PROMPT_TOKENS tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    draw = random.Random(0)
    prompts: set[str] = set()
    while len(prompts) < count:
        words = " ".join(draw.choice(["red", "two", "house", "of", "tree", "sun", "goes"]) for _ in range(60))
        text = tokenizer.decode(tokenizer.encode(words, add_special_tokens=False)[:PROMPT_TOKENS])
        if len(tokenizer.encode(text, add_special_tokens=False)) == PROMPT_TOKENS:
            prompts.add(text)
    path.write_text("".join(json.dumps({"prompt": prompt, "label": "0"}) + "\n" for prompt in sorted(prompts)))


def train_command(model_path: str, folder: Path, num_steps: int, extra: Sequence[str]) -> list[str]:
    """train.py and its flags."""
    return [
        *(sys.executable, str(ROOT / "train.py")),
        *("--output-dir", str(folder), "--run-name", "run", "--device", "cpu"),
        *("--hf-checkpoint", model_path, "--prompt-data", str(folder / "prompts.jsonl")),
        *("--input-key", "prompt", "--label-key", "label", "--rm-type", "last_number"),
        *("--num-rollout", str(num_steps), "--num-steps-per-rollout", "1"),
        *("--rollout-batch-size", str(NUM_PROMPTS), "--n-samples-per-prompt", str(NUM_SAMPLES)),
        *("--rollout-max-response-len", str(NEW_TOKENS)),
        *("--custom-generate-function-path", f"{ROOT / 'benchmarks' / 'exact_length.py'}:generate"),
        *("--advantage-estimator", "grpo", "--lr", "1e-6"),
        *("--colocate", "--actor-num-nodes", "1", "--actor-num-gpus-per-node", "1", "--num-gpus-per-node", "1"),
        *("--use-dynamic-batch-size", "--max-tokens-per-gpu", "2304"),
        *extra,
    ]


def check_lengths(steps: Sequence[dict[str, Any]]) -> None:
    """Exit unless every step made what it should."""
    for step in steps:
        if (length := step["rollout/response_lengths"]) != NEW_TOKENS:
            raise SystemExit(f"Step {step['step']} made responses of {length} tokens on average, not of {NEW_TOKENS}.")


def main() -> int:
    """Run, measure and print; the exit code is 1 if the run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True, help="folder in HuggingFace format")
    parser.add_argument("--steps", type=int, default=3, help="steps that are counted, after one that is not")
    parser.add_argument("extra", nargs="*", help="further flags of train.py, after --")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(options.model_path, folder / "prompts.jsonl", NUM_PROMPTS * (options.steps + 1))
        watch = PhaseWatch(folder / "run")
        command = train_command(options.model_path, folder, options.steps + 1, options.extra)
        code, family = run(command, watch.pause)
        if code:
            return 1
        steps = [step for step in read_metrics(folder / "run") if step["step"] >= 1]
    check_lengths(steps)
    names = {key: watch.names.get(key[0], process.name) for key, process in family.members.items()}
    print_report(breakdown(watch.edges, names, first_step=1), steps)
    return 0


def print_report(costs: Breakdown, steps: Sequence[dict[str, Any]]) -> None:
    """Speed, shares, and a table in CPU-seconds a step."""
    tokens = NUM_PROMPTS * NUM_SAMPLES * NEW_TOKENS
    speed = tokens * costs.num_steps / costs.total_s
    phases = sorted({phase for phase, _ in costs.cells}, key=costs.phase_s, reverse=True)
    processes = sorted({process for _, process in costs.cells}, key=costs.process_s, reverse=True)
    print(f"{costs.num_steps} steps of {tokens} completion tokens, {costs.total_s / costs.num_steps:.2f} CPU-s each")
    print(f"{speed:.1f} completion tokens per CPU-second (at least {TOKENS_PER_CPU_S:g}; ratio {speed / 70:.2f})")
    print(f"generation and training {costs.working:.1%} of it (at least 90 %), accounted for {costs.accounted:.1%}")
    wall = [sum(step.get(f"perf/{name}_time", 0.0) for step in steps) / len(steps) for name in ("step", "other")]
    print(f"wall: {wall[0]:.1f} s a step, {1 - wall[1] / wall[0]:.1%} of it in named phases\n")
    print("| CPU-s a step | " + " | ".join(phases) + " | all | share |")
    print("|---" * (len(phases) + 3) + "|")
    for process in processes:
        cells = [f"{costs.cells.get((phase, process), 0.0) / costs.num_steps:.2f}" for phase in phases]
        whole = costs.process_s(process)
        print(f"| {process} | {' | '.join(cells)} | {whole / costs.num_steps:.2f} | {whole / costs.total_s:.1%} |")
    sums = " | ".join(f"{costs.phase_s(phase) / costs.num_steps:.2f}" for phase in phases)
    print(f"| all | {sums} | {costs.total_s / costs.num_steps:.2f} | 100 % |")


if __name__ == "__main__":
    sys.exit(main())
