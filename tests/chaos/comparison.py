"""One undisturbed run, the same under attack, and whether they came out alike: what the benchmark and the tests do."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos.attacks import Attack, rollouts_needed
from tests.chaos.campaign import Campaign, Outcome, usual_times
from tests.chaos.judge import differences
from tests.chaos.report import report
from tests.chaos.tiny_run import TinyRun, save_model_and_prompts


@dataclass(frozen=True)
class Comparison:
    """What came out."""

    outcomes: list[Outcome]
    problems: list[str]
    """Of either run as a whole, and what differs between them; each outcome has its own besides."""

    @property
    def is_right(self) -> bool:
        return not self.problems and not any(outcome.problems for outcome in self.outcomes)

    def __str__(self) -> str:
        return report(self.outcomes, self.problems)


def attack_and_compare(
    folder: Path,
    attacks: Sequence[Attack],
    *,
    is_fault_tolerant: bool = True,
    liveness_timeout_s: float = 60.0,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run in peace, then under attack, both in `folder`; no attack is made when the first already goes wrong."""
    run = TinyRun(
        folder / "attacked",
        save_model_and_prompts(folder / "model"),
        rollouts_needed(attacks),
        is_fault_tolerant=is_fault_tolerant,
        liveness_timeout_s=liveness_timeout_s,
    )
    peaceful = Campaign(replace(run, folder=folder / "peaceful"), [], {}, say=say)
    peaceful.carry_out()
    if peaceful.problems:
        return Comparison([], peaceful.problems)
    usual_s = usual_times(peaceful.run.folder)
    say("usual times: " + ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in usual_s.items()))
    campaign = Campaign(run, attacks, usual_s, say=say)
    campaign.carry_out()
    if campaign.run.num_rollout > run.num_rollout:
        peaceful.run = replace(peaceful.run, num_rollout=campaign.run.num_rollout)
        peaceful.carry_out()
    found = peaceful.problems or differences(peaceful.run.folder, run.folder, campaign.run.num_rollout)
    return Comparison(campaign.outcomes, [*campaign.problems, *found])


def say_with_time(text: str) -> None:
    """Print an event and when it was."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
