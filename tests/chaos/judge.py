"""Whether a run that was attacked came out as if nothing had happened: weights, metrics, samples, exports, ledger."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from slime.observability.ledger import LedgerError, check_ledger, read_ledger
from slime.observability.run_log import read_metrics
from tests.chaos.tiny_run import SAVE_INTERVAL


def differences(reference: Path, attacked: Path, num_rollout: int) -> list[str]:
    """What differs between two finished runs of `num_rollout` rollouts, in words; nothing when they are the same."""
    if found := missing_steps(attacked, num_rollout):
        return found  # the rest would only say it again
    return [
        *_of_exports(reference, attacked, num_rollout),
        *of_metrics(reference, attacked),
        *_of_samples(reference, attacked, num_rollout),
        *of_ledgers(reference, attacked, num_rollout),
    ]


def _of_exports(reference: Path, attacked: Path, num_rollout: int) -> list[str]:
    """Every export, not only the last: a kill in mid-save must not leave a half-written or missing one."""
    found = []
    for rollout_id in range(SAVE_INTERVAL - 1, num_rollout, SAVE_INTERVAL):
        ours, theirs = (tensors(run / "exports" / str(rollout_id)) for run in (reference, attacked))
        if not ours or ours.keys() != theirs.keys():
            found.append(f"the export of rollout {rollout_id} has {len(theirs)} tensors, the reference's {len(ours)}")
            continue
        unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        if unequal:
            found.append(f"the export of rollout {rollout_id}: {len(unequal)} tensors differ, {unequal[0]} first")
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a HuggingFace export, empty where there is none."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def missing_steps(attacked: Path, num_rollout: int) -> list[str]:
    """metrics.jsonl has each step once, in order."""
    steps = [line["step"] for line in read_metrics(attacked) if line["step"] >= 0]
    if steps == list(range(num_rollout)):
        return []
    return [f"metrics.jsonl has the steps {steps}, not 0 to {num_rollout - 1} once each"]


def of_metrics(reference: Path, attacked: Path) -> list[str]:
    """Steps of which another metric than a time differs."""
    ours, theirs = (read_metrics(run) for run in (reference, attacked))
    found = []
    by_step = {line["step"]: line for line in ours}
    for line in theirs:
        expected = by_step.get(line["step"], {})
        unequal = [name for name in comparable(expected | line) if expected.get(name) != line.get(name)]
        if unequal:
            name = unequal[0]
            values = f"{line.get(name)!r}, in the reference {expected.get(name)!r}"
            found.append(f"metrics of step {line['step']}: {len(unequal)} differ, {name} is {values}")
    return found


def comparable(line: dict[str, Any]) -> list[str]:
    """Metrics that two equal runs share: all but times, and what depends on which engine saw which prompt first."""
    return [name for name in line if name != "time" and not name.startswith("perf/") and "cache" not in name]


def _of_samples(reference: Path, attacked: Path, num_rollout: int) -> list[str]:
    found = []
    for rollout_id in range(num_rollout):
        name = f"rollout_{rollout_id:06d}.jsonl"
        ours, theirs = (read_samples(run / "samples" / name) for run in (reference, attacked))
        if ours != theirs:
            first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            found.append(f"samples of rollout {rollout_id}: {len(theirs)} rows, row {first} differs first")
    return found


def of_ledgers(reference: Path, attacked: Path, num_rollout: int) -> list[str]:
    """Gaps and doubles of the attacked run's ledger, and rollouts in which other rows were trained."""
    try:
        summary = check_ledger(attacked)
        ours, theirs = read_ledger(reference), read_ledger(attacked)
    except (LedgerError, FileNotFoundError) as error:
        return [str(error)]
    found = []
    if summary.num_rollouts != num_rollout:
        found.append(f"the ledger has {summary.num_rollouts} rollouts, not {num_rollout}")
    if summary.unknown:
        found.append(f"the ledger has {summary.unknown} entries of unknown rows")
    unequal = [line["rollout_id"] for line, expected in zip(theirs, ours, strict=False) if line != expected]
    if unequal:
        found.append(f"the ledger differs from the reference's in the rollouts {unequal}")
    return found


def read_samples(path: Path) -> list[Any]:
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
