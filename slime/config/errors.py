"""The error for a configuration that cannot run, and a collector that reports several of them at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot run: what was seen, why it cannot be, what to type.

    Attributes:
        messages: one entry per independent problem.
    """

    def __init__(self, *messages: str) -> None:
        self.messages = messages
        super().__init__("\n".join(messages))


class Problems:
    """Collects independent `ConfigError`s, so that one start shows them all."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, *messages: str) -> None:
        """Record problems, each once."""
        self.messages += [m for m in dict.fromkeys(messages) if m not in self.messages]

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Swallow a `ConfigError` raised in the block and remember it."""
        try:
            yield
        except ConfigError as error:
            self.add(*error.messages)

    def check_all(self, rules: tuple[Callable[[Any], None], ...], subject: object) -> None:
        """Apply every rule to the subject, remembering what each raises."""
        for rule in rules:
            with self.collected():
                rule(subject)

    def raise_if_any(self) -> None:
        """Raise one `ConfigError` with everything that was recorded."""
        if self.messages:
            raise ConfigError(*self.messages)


def did_you_mean(word: str, known: list[str] | tuple[str, ...] | set[str], limit: int = 3) -> str:
    """` Did you mean a, b or c?` for known words that begin like it or are near it, or an empty string."""
    begun = sorted((name for name in known if word and name.startswith(word)), key=len)
    close = get_close_matches(word, sorted(known), n=limit, cutoff=0.6)
    near = list(dict.fromkeys(begun + close))[:limit]
    if not near:
        return ""
    listed = near[0] if len(near) == 1 else f"{', '.join(near[:-1])} or {near[-1]}"
    return f" Did you mean {listed}?"
