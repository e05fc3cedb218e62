"""A rollout that never drains the engines: a pool of groups stays in flight while rollouts are taken out and trained.

`--rollout-function-path slime.rollout.fully_async_rollout.generate_rollout_fully_async`. A rollout is the first
`--rollout-batch-size` groups that are done, those of the oldest weights first; what is unfinished goes on, through new
weights too. The pool is bounded: it holds --async-buffer-size rollouts, in flight or ready, an eighth of one to spare
(or what --over-sampling-batch-size adds), and groups that are late. None is trained that is more than
--async-buffer-size + --update-weights-interval rollouts old; what becomes of a group that would be is said by
--stale-samples.
"""

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from slime.rollout.base_types import RolloutFnTrainOutput, flatten_samples
from slime.rollout.collection import Collection, Outcome, first_index, group_index
from slime.rollout.data_source import Origin, RolloutDataSourceWithBuffer, exclusive
from slime.rollout.progress import progress_bar
from slime.rollout.sample_state import from_state, to_state
from slime.rollout.sglang_rollout import GenerateState, _load_optional, _process, generate_and_rm_group
from slime.rollout.staleness import made_from, staleness_limit, weight_clock
from slime.utils.async_utils import run
from slime.utils.http_utils import get_rollout_num_engines
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

_SPARE = 8
"""One group in so many is drawn beyond what a rollout needs, so that a late one makes nobody wait; at most a rollout's
worth, which keeps all others below the limit."""
_STATUS_S = 60.0
"""A rollout that waits says so this often."""


@dataclass(eq=False)
class _Flight:
    """One group on its way: drawn, in flight, done, taken."""

    number: int
    """In the order of drawing."""
    group: list[Any]
    """As it was drawn; as it was made once it is done."""
    drawn: Any
    """The group before it was started, as plain data."""
    origin: Origin | None
    made_from: int
    """Rollouts trained into the oldest weights that it may have a token of."""
    task: "asyncio.Task[list[Any]] | None" = None
    rollout_id: int | None = None
    """That took it."""


@dataclass
class _Pool:
    """The groups that were drawn and not given up, by where they are."""

    in_flight: list[_Flight] = field(default_factory=list)
    done: list[_Flight] = field(default_factory=list)
    taken: list[_Flight] = field(default_factory=list)
    """By rollouts that no checkpoint can hold yet."""

    def held_after(self, rollout_id: int) -> Iterator[tuple[_Flight, bool]]:
        """Groups that a checkpoint of `rollout_id` must bring back, in the order of drawing; whether each is done."""
        again = [flight for flight in self.taken if (flight.rollout_id or 0) > rollout_id]
        held = [(flight, False) for flight in [*self.in_flight, *again]] + [(flight, True) for flight in self.done]
        yield from sorted(held, key=lambda item: item[0].number)


class AsyncRolloutWorker:
    """Keeps groups in flight from start to stop; lives on the background loop, callable from any other thread."""

    def __init__(self, args: Namespace, data_buffer: Any, concurrency: int | None = None) -> None:
        """
        Args:
            args: reads the sizes of a rollout, its hooks, `async_buffer_size` and `stale_samples`.
            data_buffer: the run's data source; it must take groups back.
            concurrency: groups in flight at most; what --sglang-server-concurrency allows where it is not given.
        """
        if not hasattr(data_buffer, "add_samples"):
            raise TypeError(f"{type(data_buffer).__name__} has no add_samples to take unfinished groups back.")
        self.args, self.data_buffer = args, data_buffer
        requests = args.sglang_server_concurrency * max(1, get_rollout_num_engines(args))
        self.concurrency = concurrency or max(1, requests // args.n_samples_per_prompt)
        spare = max(args.over_sampling_batch_size - args.rollout_batch_size, args.rollout_batch_size // _SPARE)
        self.capacity = args.rollout_batch_size * args.async_buffer_size + min(spare, args.rollout_batch_size)
        self._policy = getattr(args, "stale_samples", "discard")
        self._limit = staleness_limit(args)
        self._pool = _Pool()
        self._num_drawn = 0
        self._next_rollout = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self._is_running = False

    # ---- from other threads ----

    def start(self) -> None:
        """Begin to draw and to generate."""
        if isinstance(self.data_buffer, RolloutDataSourceWithBuffer):
            self.data_buffer.holder = self
        else:
            logger.warning(
                "%s keeps its own state: groups in flight at a checkpoint do not come back after a resume",
                type(self.data_buffer).__name__,
            )
        run(self.begin())

    def stop(self) -> None:
        """Cancel what is in flight; its groups stay in the pool for a checkpoint."""
        run(self.end())

    def queue_size(self) -> int:
        """Groups that are done and not taken."""
        return len(self._pool.done)

    def get_completed_groups(self, limit: int | None = None) -> list[tuple[int, list[Any]]]:
        """Take groups that are done, oldest first: (number, group). For loops of one's own; no filter is asked."""
        return run(self._take_done(limit))

    def take_rollout(self, rollout_id: int) -> RolloutFnTrainOutput:
        """Wait until a rollout is full and take it."""
        return run(self.collect(rollout_id))

    def state_after(self, rollout_id: int) -> dict[str, Any]:
        """The data source's state for a checkpoint: what no rollout up to `rollout_id` has taken is in its buffer."""
        return run(self._state_after(rollout_id))

    # ---- on the loop ----

    async def begin(self) -> None:
        """`start`, for a coroutine."""
        self._is_running = True
        self._top_up()

    async def end(self) -> None:
        """`stop`, for a coroutine."""
        self._is_running = False
        tasks = [flight.task for flight in self._pool.in_flight if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_done(self, limit: int | None) -> list[tuple[int, list[Any]]]:
        chosen = sorted(self._pool.done, key=_oldest_first)[:limit]
        for flight in chosen:
            self._pool.done.remove(flight)
        self._top_up()
        return [(flight.number, flight.group) for flight in chosen]

    def _top_up(self) -> None:
        """Draw and start groups while there is room for them."""
        while self._is_running and self._failure is None and self._has_room():
            with exclusive(self.data_buffer):
                groups = self.data_buffer.get_samples(1)
                if not groups:
                    raise RuntimeError("The data source gave no group where 1 was asked for.")
                for group in groups:
                    self._begin(group)

    def _has_room(self) -> bool:
        """Groups that are late, so that they will be too old for the rollout after the next, count no more."""
        after_next = self._next_rollout + 1
        in_time = sum(not self._is_due(flight, after_next) for flight in self._pool.in_flight)
        return len(self._pool.in_flight) < self.concurrency and in_time + len(self._pool.done) < self.capacity

    def _begin(self, group: list[Any]) -> None:
        index = group_index(group)
        origin = None if index is None else getattr(self.data_buffer, "outstanding", {}).get(index)
        older = made_from(group)
        trained = weight_clock().trained
        drawn = to_state(group, "group")
        flight = _Flight(self._num_drawn, group, drawn, origin, trained if older is None else min(older, trained))
        self._num_drawn += 1
        params = GenerateState(self.args).sampling_params.copy()
        flight.task = asyncio.create_task(
            generate_and_rm_group(self.args, group, params, evaluation=False), name=f"group-{flight.number}"
        )
        self._pool.in_flight.append(flight)
        flight.task.add_done_callback(lambda task: self._land(flight, task))

    def _land(self, flight: _Flight, task: "asyncio.Task[list[Any]]") -> None:
        if task.cancelled() or flight not in self._pool.in_flight:  # stopped, or given up
            return
        try:
            flight.group = task.result()
            self._pool.in_flight.remove(flight)
            if any(sample.status == Sample.Status.ABORTED for sample in flatten_samples(flight.group)):
                self._give_back(flight)
            else:
                made = made_from(flight.group)
                flight.made_from = flight.made_from if made is None else made
                self._pool.done.append(flight)
            self._top_up()
        except Exception as error:
            self._failure = self._failure or error
        self._changed.set()

    def _give_back(self, flight: _Flight) -> None:
        """A group that was cut goes on later with what it has; one of several samples a member starts again."""
        is_plain = all(isinstance(sample, Sample) for sample in flight.group)
        with exclusive(self.data_buffer):
            self.data_buffer.add_samples([flight.group if is_plain else from_state(flight.drawn)])

    # ---- one rollout ----

    async def collect(self, rollout_id: int) -> RolloutFnTrainOutput:
        """`take_rollout`, for a coroutine."""
        args, pool, started = self.args, self._pool, time.perf_counter()
        pool.taken = [f for f in pool.taken if (f.rollout_id or 0) >= rollout_id - args.async_buffer_size]
        collection = Collection(args, rollout_id, _load_optional(args, "dynamic_sampling_filter_path"))
        self._next_rollout = rollout_id
        self._top_up()
        with progress_bar(collection.target, f"rollout {rollout_id}") as bar:
            while True:
                bar.update(self._take_into(collection))
                if collection.is_full:
                    break
                self._top_up()
                await self._wait_for_a_group(rollout_id, len(collection.kept))
        self._next_rollout = rollout_id + 1
        if self._policy == "discard":
            self._give_up_what_is_due(collection)
        self._top_up()
        groups = sorted(collection.kept, key=first_index)
        fates = collection.fates(keeps_unfinished=True)
        _process(args, "rollout_sample_filter_path", groups)
        every = sorted(collection.finished, key=first_index)
        _process(args, "rollout_all_samples_process_path", every, self.data_buffer)
        logger.info(
            "rollout %d: %d groups of %d after %.1f s  dropped %d  too old %d  in flight %d  ready %d",
            rollout_id, len(groups), args.n_samples_per_prompt, time.perf_counter() - started, collection.num_dropped,
            collection.staleness.num_discarded, len(pool.in_flight), len(pool.done),
        )  # fmt: skip
        metrics = collection.metrics(fates)
        metrics |= {"rollout/pool/in_flight": len(pool.in_flight), "rollout/pool/ready": len(pool.done)}
        return RolloutFnTrainOutput(samples=groups, metrics=metrics, fates=fates)

    def _take_into(self, collection: Collection) -> int:
        """Take what is done and fits; returns how many groups were kept."""
        pool, num_kept = self._pool, 0
        for flight in sorted(pool.done, key=_oldest_first):
            if not self._fits(flight, collection):
                continue
            pool.done.remove(flight)
            self._take(flight, collection.rollout_id)
            number = collection.num_drawn
            collection.note_drawn([flight.group])
            remaining = len(collection.kept) + 1 + len(pool.done) + len(pool.in_flight)
            num_kept += collection.take(number, flight.group, remaining) is Outcome.KEPT
        return num_kept

    def _fits(self, flight: _Flight, collection: Collection) -> bool:
        """--stale-samples wait keeps places free for groups in flight that will be too old for the next rollout."""
        places: int = collection.target - len(collection.kept)
        if self._policy == "wait" and not self._is_due(flight, collection.rollout_id + 1):
            places -= sum(self._is_due(other, collection.rollout_id + 1) for other in self._pool.in_flight)
        return places > 0

    def _is_due(self, flight: _Flight, rollout_id: int) -> bool:
        """Whether the group is too old to be trained in `rollout_id`; never where no weights are ever sent."""
        if self._limit is None or weight_clock().current is None:
            return False
        return rollout_id - flight.made_from > self._limit

    def _give_up_what_is_due(self, collection: Collection) -> None:
        """End groups in flight that will be too old whenever they are done; they count as discarded."""
        for flight in [f for f in self._pool.in_flight if self._is_due(f, collection.rollout_id + 1)]:
            assert flight.task is not None
            flight.task.cancel()  # closes its connection, on which engines abort the request
            self._pool.in_flight.remove(flight)
            self._take(flight, collection.rollout_id)
            collection.give_up(flight.group)

    def _take(self, flight: _Flight, rollout_id: int) -> None:
        flight.rollout_id = rollout_id
        self._pool.taken.append(flight)

    async def _wait_for_a_group(self, rollout_id: int, num_kept: int) -> None:
        """
        Raises:
            Exception: that ended a group, or the drawing of one.
        """
        while not self._changed.is_set() and self._failure is None:
            try:
                await asyncio.wait_for(self._changed.wait(), _STATUS_S)
            except TimeoutError:
                logger.info(
                    "rollout %d waits: %d groups kept, %d in flight", rollout_id, num_kept, len(self._pool.in_flight)
                )
        self._changed.clear()
        if self._failure is not None:
            raise self._failure

    # ---- checkpoints ----

    async def _state_after(self, rollout_id: int) -> dict[str, Any]:
        source = self.data_buffer
        with exclusive(source):
            state: dict[str, Any] = source.state()
            held = list(self._pool.held_after(rollout_id))
            groups = [to_state(flight.group, "group") if is_done else flight.drawn for flight, is_done in held]
            origins = {entry[0]: list(entry) for entry in state["outstanding"]}
            for flight, _ in held:
                index = group_index(flight.group)
                if flight.origin is not None and index is not None:
                    origins[index] = [index, *flight.origin]
        return state | {"buffer": [*groups, *state["buffer"]], "outstanding": list(origins.values())}


def _oldest_first(flight: _Flight) -> tuple[int, int]:
    return flight.made_from, flight.number


# ---- the entry point ----

_worker: AsyncRolloutWorker | None = None


def generate_rollout_fully_async(
    args: Namespace, rollout_id: int, data_buffer: Any, evaluation: bool = False
) -> RolloutFnTrainOutput:
    """One rollout out of the pool, which the first call starts.

    Raises:
        ValueError: asked to evaluate; --eval-function-path is for that, and is the default rollout's by default.
    """
    global _worker
    if evaluation:
        raise ValueError(
            "The fully asynchronous rollout does not evaluate. Leave --eval-function-path out, or give "
            "slime.rollout.sglang_rollout.generate_rollout."
        )
    if _worker is None or _worker.data_buffer is not data_buffer:
        if _worker is not None:
            _worker.stop()
        _worker = AsyncRolloutWorker(args, data_buffer)
        _worker.start()
    return _worker.take_rollout(rollout_id)
