"""The plan of a run: everything decided before anything starts, and its text for people."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slime.config.batches import Batch
from slime.config.devices import Choice, Parallel, Placement
from slime.config.paths import RunPaths, Start

TRAINER = "trainer ranks"


@dataclass(frozen=True)
class Process:
    """A kind of process that the run starts."""

    name: str
    count: int
    devices: int
    """Devices of each."""
    threads: int
    """CPU threads of each one's computation."""


@dataclass(frozen=True)
class Plan:
    """What `resolve` decided. `updates` are the attributes of `args` that differ from the command line's."""

    loop: Literal["sync", "async"]
    device: Choice
    engine: Choice
    dtype: Choice
    placement: Placement
    parallel: Parallel
    batch: Batch
    paths: RunPaths
    start: Start
    num_rollout: int | None
    num_epoch: int | None
    eval_tasks: tuple[str, ...]
    eval_interval: int | None
    model: str
    """The model in words: architecture, layers, parameters; or that its flags say it."""
    algorithm: str
    processes: tuple[Process, ...]
    memory: str | None = None
    """How trainer and engines divide a GPU that they share; None where none is shared."""
    updates: Mapping[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the user said: value by dest, before anything was derived from it."""

    def as_text(self) -> str:
        """The plan as a table, one fact a line."""
        width = 20
        lines = []
        for title, facts in self._sections():
            lines.append(title)
            for name, text in facts:
                lines.append(f"  {name:<{width}}{text}")
        return "\n".join(lines)

    def _sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        yield "run", self._run_facts()
        yield "processes", [(p.name, _process(p)) for p in self.processes]
        yield "batch", self._batch_facts()
        yield "paths", self._path_facts()
        if self.notes:
            yield "notes", [("", note) for note in self.notes]

    def _run_facts(self) -> list[tuple[str, str]]:
        p, q = self.placement, self.parallel
        needed = f"{p.devices_needed} of {_known(p.devices_available)} {p.device} devices, {_count(p.cores, 'core')}"
        return [
            ("name", self.paths.run_name),
            ("model", self.model),
            ("algorithm", self.algorithm),
            ("device", f"{self.device.value} ({self.device.reason})"),
            ("devices", needed),
            ("dtype", f"{self.dtype.value} ({self.dtype.reason})"),
            ("engine", f"{self.engine.value} ({self.engine.reason})" if p.num_engines else "none is started"),
            ("phases", self._phases()),
            *([("memory", self.memory)] if self.memory else []),
            ("parallel", f"tensor {q.tensor} x pipeline {q.pipeline} x context {q.context} x data {q.data}"),
        ]

    def _phases(self) -> str:
        if not self.placement.num_engines:
            return "training alone"
        if not any(process.name == TRAINER for process in self.processes):
            return "generation alone"
        if self.loop == "async":
            return "generation and training run together"
        shared = "on the same devices" if self.placement.colocate else "each on its own devices"
        return f"generation and training take turns, {shared}"

    def _batch_facts(self) -> list[tuple[str, str]]:
        b = self.batch
        steps = _count(b.num_steps_per_rollout, "optimizer step")
        length = f"{self.num_rollout} rollouts" if self.num_rollout is not None else _count(self.num_epoch, "epoch")
        total = (
            f", {self.num_rollout * b.num_steps_per_rollout} optimizer steps in all"
            if self.num_rollout is not None
            else " (rollouts known once the prompts are read)"
        )
        facts = [
            ("a rollout", f"{b.rollout_batch_size} prompts x {b.n_samples_per_prompt} = {b.samples} samples"),
            ("training", f"{steps} of {b.global_batch_size} samples for each rollout"),
            ("run", length + total),
        ]
        if self.eval_tasks:
            every = f"every {self.eval_interval} rollouts" if self.eval_interval else "when asked for"
            facts.append(("evaluation", f"{', '.join(self.eval_tasks)}, {every}"))
        return facts

    def _path_facts(self) -> list[tuple[str, str]]:
        start = f"{self.start.load} ({self.start.reason})"
        facts = [("run", self.paths.run_dir), ("starts from", start)]
        if self.start.ref_load:
            facts.append(("reference", self.start.ref_load))
        return [*facts, ("checkpoints", self.paths.save or "none are saved (--save-interval N saves them)")]


def _process(process: Process) -> str:
    devices = f", {_count(process.devices, 'device')} each" if process.devices else ""
    threads = f", {_count(process.threads, 'thread')} each" if process.threads else ""
    return f"{process.count}{devices}{threads}"


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _known(number: int | None) -> str:
    return "the cluster's" if number is None else str(number)
