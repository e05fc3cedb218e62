"""Which process is signalled, when, and by what: plans drawn from a seed, so that a failure can be repeated."""

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.tiny_run import EVAL_INTERVAL, SAVE_INTERVAL

PHASES = ("generate", "train", "sync", "save")
STOPPED_PHASES = (*PHASES, "eval")
START = "start"
GRADING_CHILD = "grading child"
RECOVERING = ("engine 0", "engine 1", "router", GRADING_CHILD)
"""Targets whose death the run survives."""
ENDING = ("driver", "actor rank 0", "actor rank 1", "rollout manager")
"""Targets whose death ends the run; the same command line goes on."""
STOPPED = ("driver", "rollout manager", "actor rank 0", "actor rank 1", "engine 0", "router", "owner of engine 0")
"""Targets of SIGSTOP."""
LATEST_FRACTION = 0.8


@dataclass(frozen=True)
class Attack:
    """One signal to one process."""

    number: int
    target: str
    phase: str
    rollout: int
    """Not before this rollout (not read in the phase `start`)."""
    fraction: float
    """When in the phase: the share of its usual time."""
    signal: signal.Signals

    def __str__(self) -> str:
        return f"{self.number}: {self.signal.name} to {self.target} in {self.phase}, from rollout {self.rollout}"


def draw_kills(count: int, seed: int) -> list[Attack]:
    """SIGKILL to `count` processes, two in five of them processes whose death ends the run.

    Targets and phases take turns in a drawn order, so that no pair waits for luck; one start in four that
    follows is attacked too.
    """
    dice = random.Random(seed)
    decks = {True: Deck(ENDING, PHASES, dice), False: Deck(RECOVERING, PHASES, dice)}
    order: list[bool] = []
    attacks: list[Attack] = []
    rollout, just_ended = 1, False
    while len(attacks) < count:
        number = len(attacks)
        if just_ended and dice.random() < 1 / 4:
            target = dice.choice([*ENDING, "engine 0", "router"])
            attacks.append(Attack(number, target, START, 0, dice.uniform(0.1, 0.95), signal.SIGKILL))
            just_ended = target in ENDING
            continue
        if not order:
            order = dice.sample([True, True, False, False, False], 5)
        just_ended = order.pop()
        target, phase = decks[just_ended].draw()
        attacks.append(Attack(number, target, phase, rollout, dice.uniform(0, LATEST_FRACTION), signal.SIGKILL))
        rollout += _rollouts_between(phase)
    return attacks


def draw_stops(targets: Sequence[str], phases: Sequence[str], seed: int, count: int | None = None) -> list[Attack]:
    """SIGSTOP to each target in each phase, in a drawn order, or to the first `count` of these pairs.

    The first pairs are of different targets, as many as there are.
    """
    dice = random.Random(seed)
    deck = Deck(targets, phases, dice)
    attacks, rollout = [], 1
    for number in range(len(targets) * len(phases) if count is None else count):
        target, phase = deck.draw()
        fraction = dice.uniform(0, LATEST_FRACTION)
        attacks.append(Attack(number, target, phase, rollout, fraction, signal.SIGSTOP))
        rollout += _rollouts_between(phase)
    return attacks


def rollouts_needed(attacks: Sequence[Attack], first: int = 1) -> int:
    """A number of rollouts in which all of them find their phase, begun at rollout `first`, ending with a save."""
    last = first + sum(_rollouts_between(attack.phase) for attack in attacks)
    return (last // SAVE_INTERVAL + 2) * SAVE_INTERVAL


def _rollouts_between(phase: str) -> int:
    """How many rollouts pass at most until the phase has come once."""
    return {"save": SAVE_INTERVAL, "eval": EVAL_INTERVAL, START: 0}.get(phase, 1)


class Deck:
    """Pairs of a target and a phase in a drawn order in which both change with every pair; begins again at its end."""

    def __init__(self, targets: Sequence[str], phases: Sequence[str], dice: random.Random) -> None:
        self._targets, self._phases, self._dice = targets, phases, dice
        self._pairs: list[tuple[str, str]] = []

    def draw(self) -> tuple[str, str]:
        if not self._pairs:
            targets = self._dice.sample(self._targets, len(self._targets))
            phases = self._dice.sample(self._phases, len(self._phases))
            self._pairs = [
                (target, phases[(index + turn) % len(phases)])
                for turn in range(len(phases))
                for index, target in enumerate(targets)
            ][::-1]
        return self._pairs.pop()
