"""What a campaign has shown, as text: a table of targets and phases, times, and every problem."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from tests.chaos.campaign import Outcome


def report(outcomes: Sequence[Outcome], problems: Sequence[str]) -> str:
    """The table, the medians and, last, what went wrong or that nothing did."""
    blocks = [table(outcomes), medians(outcomes)]
    failed = [outcome for outcome in outcomes if outcome.problems]
    texts = [f"{outcome.attack}: {problem}" for outcome in failed for problem in outcome.problems] + list(problems)
    blocks.append("\n".join(f"PROBLEM {text}" for text in texts) or f"{len(outcomes)} attacks, no problem")
    return "\n\n".join(block for block in blocks if block)


def table(outcomes: Sequence[Outcome]) -> str:
    """Rows are targets, columns phases; a cell counts outcomes: 2r recovered, 1e ended, 1l lost, ! with a problem."""
    phases = sorted({outcome.attack.phase for outcome in outcomes})
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in outcomes:
        mark = outcome.kind[0] + ("!" if outcome.problems else "")
        cells[outcome.attack.target, outcome.attack.phase].append(mark)
    lines = [f"{'':<20}" + "".join(f"{phase:>12}" for phase in phases)]
    for target in sorted({outcome.attack.target for outcome in outcomes}):
        texts = []
        for phase in phases:
            marks = cells[target, phase]
            texts.append(" ".join(f"{marks.count(mark)}{mark}" for mark in sorted(set(marks))))
        lines.append(f"{target:<20}" + "".join(f"{text or '-':>12}" for text in texts))
    return "\n".join([*lines, "r: the run went on, e: it ended, l: neither in time; !: not as it must"])


def medians(outcomes: Sequence[Outcome]) -> str:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in outcomes:
        times[outcome.attack.target, outcome.kind].append(outcome.seconds)
    return "\n".join(
        f"{target}: {kind} after {statistics.median(seconds):.1f} s (median of {len(seconds)}, "
        f"longest {max(seconds):.1f} s)"
        for (target, kind), seconds in sorted(times.items())
    )
