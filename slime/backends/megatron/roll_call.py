"""Names the ranks that did not come, when a collective did not end in time: a rank that waited asks all for an answer.

torch says only that it waited. So every rank has a thread that sleeps until somebody calls the roll through the
rendezvous store, and then answers with what its rank is doing. A rank that is stopped or dead does not answer.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from slime.utils.rendezvous import connect

_ANSWER_S = 5.0
"""How long a rank may take to answer: it only has to write a line, but the machine may be busy."""
_LONG = timedelta(days=20)
"""About what torch can wait at once: 2**31 ms."""
_ASKED = "slime/roll_call"
_SIGNS = ("timed out", "timeout", "connection closed by peer", "connection reset", "broken pipe", "socket error")
"""What torch and gloo say when another rank is late or gone, in lower case."""


def _call(rank: int) -> str:
    """What a rank waits for."""
    return f"{_ASKED}/call/{rank}"


class RollCall:
    """One a rank. Collective verbs run inside `during`."""

    def __init__(self, address: str, port: int, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._does, self._since = "nothing", time.monotonic()
        # Connections of their own: a store that waits lets nobody else through.
        self._store = connect(address, port, timeout=timedelta(seconds=_ANSWER_S))
        self._ear = connect(address, port, timeout=timedelta(seconds=_ANSWER_S))
        self._is_closed = False
        self._thread = threading.Thread(target=self._answer, name="roll call", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more: a thread that waits in torch when its process ends would abort it."""
        self._is_closed = True
        with suppress(RuntimeError):  # the store has gone, and the thread with it
            self._store.set(_call(self._rank), "closed")
        self._thread.join(_ANSWER_S)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Do a piece of work in which ranks wait for each other.

        Args:
            what: names it, e.g. "train on rollout 3".

        Raises:
            RuntimeError: a wait of torch's ended without the others; names the ranks that do not answer, and says what
                the others do.
        """
        before = self._does, self._since
        self._does, self._since = what, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error).lower() for sign in _SIGNS):
                raise
            waited = time.monotonic() - self._since
            raise RuntimeError(
                f"Training rank {self._rank} of {self._world_size} could not go on {waited:.1f} s after it had begun "
                f"to {what}: {self._answers()} torch says: {error}"
            ) from error
        finally:
            self._does, self._since = before

    def _answer(self) -> None:
        try:
            self._ear.wait([_call(self._rank)], _LONG)
        except RuntimeError:  # the store has gone, with rank 0
            return
        if self._is_closed:
            return
        self._ear.set(f"{_ASKED}/{self._rank}", f"{self._does} since {time.monotonic() - self._since:.1f} s")

    def _answers(self) -> str:
        """One sentence for the ranks that do not answer, one for the others."""
        said: dict[int, str] = {}
        # In a thread: a request to a store whose process is stopped never ends.
        asking = threading.Thread(target=self._ask, args=(said,), name="roll call, asking", daemon=True)
        asking.start()
        asking.join(2 * _ANSWER_S)
        if not said:
            return "rank 0, where the ranks meet, does not answer: it is stopped or has ended."
        silent = ", ".join(str(rank) for rank in range(self._world_size) if rank not in said)
        others = "; ".join(f"rank {rank}: {does}" for rank, does in sorted(said.items()) if rank != self._rank)
        named = f"rank {silent} of them does not answer: stopped or ended." if silent else "all ranks answer."
        return f"{named} What the others do: {others}." if others else named

    def _ask(self, said: dict[int, str]) -> None:
        """Call the roll and fill in what each rank says, this one too."""
        try:
            for rank in range(self._world_size):
                self._store.set(_call(rank), str(self._rank))
            deadline = time.monotonic() + _ANSWER_S
            while len(said) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                for rank in set(range(self._world_size)) - said.keys():
                    if self._store.check([key := f"{_ASKED}/{rank}"]):
                        said[rank] = self._store.get(key).decode()
        except RuntimeError:  # the store has gone
            return
