"""The rollout manager: owns engines, prompts and rewards, and turns a rollout id into training shards."""

import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray

from slime.data.batch import convert_samples_to_train_data, split_train_data_by_dp
from slime.data.shards import joined
from slime.observability import debug_dumps, logging_utils
from slime.observability.rollout_metrics import (
    flatten_samples,
    log_eval_rollout_data,
    log_rollout_data,
    staleness_metrics,
)
from slime.observability.run_status import ProcessInfo
from slime.observability.samples import write_eval_samples, write_samples
from slime.ray.cluster import enter_working_dir
from slime.ray.engines import EngineRecord, Engines
from slime.ray.liveness import THREADS, Pulse
from slime.rollout.base_types import (
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    call_rollout_fn,
    validate_rollout_id_annotated,
)
from slime.rollout.data_source import load_data_source
from slime.rollout.ledger import take_ledger_line
from slime.rollout.progress import set_bar_factory
from slime.rollout.random_state import load_random_state, save_random_state
from slime.rollout.rm_hub import warm_up
from slime.rollout.sample_hooks import set_current_rollout_id
from slime.rollout.staleness import staleness, weight_clock
from slime.utils.api_key import take_api_key
from slime.utils.async_utils import run
from slime.utils.checkpoint_folder import begin_save
from slime.utils.http_utils import generation_replies, init_http_client
from slime.utils.memory_utils import settle_objects
from slime.utils.misc import Box, load_function
from slime.utils.random_state import host_random_state
from slime.utils.server_control import abort_servers_until_idle
from slime.utils.types import Sample

logger = logging.getLogger(__name__)

_MAKING = {"rollouts": 1}
"""Concurrency group of the manager: rollouts are made one after another, in the order in which they are asked for."""
_REPLIES_S = 0.5
"""For the replies of aborted requests: SGLang pauses at once where it owes none, else it looks again after a second."""


@dataclass(frozen=True)
class MadeRollout:
    """One rollout, ready to be trained on, and what belongs to its line of the log."""

    shards: list[Box] | None
    """One a data-parallel rank; None when nothing is to be trained."""
    metrics: dict[str, Any]
    ledger: dict[str, Any] | None


@dataclass(frozen=True)
class _Before:
    """How things stood before a rollout was begun."""

    source: dict[str, Any] | None
    """None: the data source keeps its own state."""
    random: Any


class RolloutController(Pulse):
    """What the manager does, as a plain class: `RolloutManager` is the same as a Ray actor."""

    def __init__(self, args: Namespace, devices: Any) -> None:
        logging_utils.configure_logger(prefix="rollout")
        enter_working_dir(args)
        logging_utils.init_tracking(args, primary=False)
        self.args = args
        take_api_key(args)
        self._parallel_config: dict[str, int] = {}
        self._ledger: dict[str, Any] | None = None
        self._before: dict[int, _Before] = {}
        self._state_lock = threading.Lock()  # held while a rollout begins and while a checkpoint is written
        self._engines_use = _EnginesUse()
        self._devices = devices
        self._progress: tuple[str, int, int, str] | None = None
        set_bar_factory(self._bar)
        self._engines: Engines | None = None

    # ---- what the driver asks ----

    def start(self) -> None:
        """Load hooks and prompts, then start engines and router. The cheap part fails first.

        What else takes seconds goes on while engines start.
        """
        args = self.args
        self._generate_rollout = load_function(args.rollout_function_path)
        self._eval_rollout = load_function(args.eval_function_path)
        if not args.debug_train_only:
            self._engines = Engines(args, self._devices)
            self._engines.launch()
            warm_up(args)
        self.data_source = load_data_source(args)
        if self._engines is not None:
            self._engines.wait_until_ready()
            init_http_client(args)
        settle_objects()

    def get_num_rollout_per_epoch(self) -> int | None:
        if not self.args.rollout_global_dataset:
            return None
        return len(self.data_source) // self.args.rollout_batch_size

    def set_train_parallel_config(self, config: dict[str, int]) -> None:
        """Learn how the trainer splits data (dp_size, cp_size, vpp_size, ...)."""
        self._parallel_config = dict(config)

    def engine_records(self) -> list[EngineRecord]:
        return self._engines.records if self._engines else []

    def dead_servers(self) -> list[str]:
        """One text for each engine or router that is lost, with its last log lines."""
        return self._engines.dead() if self._engines is not None else []

    def give_up_silent_servers(self) -> list[str]:
        """After a call to the engines failed, and none is known to be lost: end those that hang; as `dead_servers`."""
        if self._engines is not None:
            self._engines.give_up_silent()
        return self.dead_servers()

    def restart_servers(self) -> list[EngineRecord]:
        """Start lost servers again; the engines among them, which take no request before `admit_engines`."""
        return self._engines.restart_dead() if self._engines is not None else []

    def admit_engines(self) -> None:
        """Let requests go to every engine that serves."""
        if self._engines is not None:
            self._engines.admit()

    def stop_generating(self) -> None:
        """End all requests, and begin none: the run is about to leave."""
        weight_clock().begin_update()
        if self._engines is not None:
            self._engines.pause()

    def begin_weight_update(self) -> None:
        """New weights are about to go out. Requests wait until `end_weight_update`; with --pause-generation-mode abort
        those in flight are ended first, and go on from what they have."""
        weight_clock().begin_update()
        ends_requests = self.args.max_staleness is not None and self.args.pause_generation_mode == "abort"
        if self._engines is not None and ends_requests:
            run(abort_servers_until_idle([record.url for record in self._engines.records]))
            run(generation_replies(_REPLIES_S))

    def end_weight_update(self, version: int, trained: int) -> None:
        """All engines hold `version`, into which `trained` rollouts were trained."""
        weight_clock().end_update(str(version), trained)

    def processes(self) -> list[ProcessInfo]:
        """This process, the engines and the router."""
        servers = self._engines.processes() if self._engines is not None else []
        return [ProcessInfo("rollout manager", "manager", os.getpid()), *servers]

    @ray.method(concurrency_group="rollouts")  # type: ignore[untyped-decorator]
    def make(self, rollout_id: int) -> MadeRollout:
        """Make one rollout, with its metrics; may run while earlier ones are trained on, and never beside `eval` where
        a rollout ends what is in flight."""
        with self._engines_use.for_a_rollout():
            shards = self.generate(rollout_id)
            return MadeRollout(shards, self.take_metrics(), self.take_ledger())

    def generate(self, rollout_id: int) -> list[Box] | None:
        """Make one rollout; one `Box(ObjectRef)` a data-parallel rank, or None when nothing is to be trained."""
        set_current_rollout_id(rollout_id)
        self._keep_state_before(rollout_id)
        samples = self._samples(rollout_id)
        if template := self.args.save_debug_rollout_data:
            debug_dumps.save_debug_rollout_data(template, rollout_id, samples)
        if self.args.load_debug_rollout_data is None:
            write_samples(self.args.run_dir, rollout_id, samples)
        if self.args.debug_rollout_only:
            return None
        train_data = convert_samples_to_train_data(self.args, samples)
        shards = split_train_data_by_dp(self.args, train_data, self._parallel_config)
        return [Box(ray.put(joined(shard))) for shard in shards]

    def eval(self, rollout_id: int) -> dict[str, Any]:
        """Evaluate on every task with the weights the engines hold; -1 stands for before the first rollout.

        It waits for the rollout that is being made, and the next one waits for it. Returns the metrics.
        """
        if self.args.debug_train_only:
            return {}
        with self._engines_use.for_an_evaluation():
            if self._engines is not None and self.args.pause_generation_mode == "in_place":
                self._engines.forget_caches()  # the sync before met requests, which kept their engine's cache
            self._evaluate(rollout_id)
            return self.take_metrics()

    def _evaluate(self, rollout_id: int) -> None:
        hook_id = max(rollout_id, 0)
        with self._serving():
            output: RolloutFnEvalOutput = call_rollout_fn(
                self._eval_rollout, self.args, hook_id, self.data_source, evaluation=True
            )
        samples = [sample for task in output.data.values() for sample in task.get("samples") or []]
        if template := self.args.save_debug_rollout_data:
            debug_dumps.save_debug_rollout_data(template, rollout_id, samples, evaluation=True)
        write_eval_samples(self.args.run_dir, rollout_id, output.data)
        log_eval_rollout_data(rollout_id, self.args, output.data, output.metrics)

    def progress(self) -> tuple[str, int, int, str] | None:
        """(what, done, total, unit) of the rollout or evaluation that runs now."""
        return self._progress

    @contextmanager
    def _bar(self, total: int, description: str, unit: str) -> Iterator["_Counter"]:
        def count(done: int) -> None:
            self._progress = (description, done, total, unit)

        count(0)
        try:
            yield _Counter(count)
        finally:
            self._progress = None

    def take_metrics(self) -> dict[str, Any]:
        """Metrics since the last call, those that hooks logged included."""
        return logging_utils.take_pending()

    def take_ledger(self) -> dict[str, Any] | None:
        """The ledger's line of the last rollout; None when it was replayed from a file, or was taken already."""
        line, self._ledger = self._ledger, None
        return line

    def save(self, rollout_id: int) -> None:
        """The rollout's part of a checkpoint, before the trainer's: the data source's state, this process's chance.

        Both are saved as they were after `rollout_id`, also where later rollouts have begun or are made.
        """
        with self._state_lock:
            before_next = self._before.get(rollout_id + 1)
            if hasattr(self.data_source, "thaw"):
                self.data_source.thaw()
                if before_next is not None and before_next.source is not None:
                    self.data_source.freeze(before_next.source)
            begin_save(self.args.save, rollout_id)
            self.data_source.save(rollout_id)
            save_random_state(self.args.save, rollout_id, None if before_next is None else before_next.random)

    def load(self, rollout_id: int | None = None) -> int:
        """Continue after `rollout_id`; the newest version of weights that kept samples may come from (0: none)."""
        self.data_source.load(rollout_id)
        if rollout_id is not None and not getattr(self.args, "no_load_rng", False):
            load_random_state(self.args.load, rollout_id)
        return max((int(version) for version in weight_clock().state()), default=0)

    def offload(self) -> None:
        """Engines give their memory back."""
        if self._engines is not None:
            self._engines.release_memory()

    def onload(self, tags: list[str]) -> None:
        if self._engines is not None:
            self._engines.resume_memory(tags)

    def onload_weights(self) -> None:
        self.onload(["weights"])

    def onload_kv(self) -> None:
        self.onload(["kv_cache", "cuda_graph"])

    def dispose(self) -> None:
        """End engines and router."""
        if self._engines is not None:
            self._engines.stop()
            self._engines = None

    # ---- one rollout ----

    def _keep_state_before(self, rollout_id: int) -> None:
        """A checkpoint of the step before, which may be written while this rollout is made or waits to be trained on,
        holds the data source as it is now: if its samples are never trained on, their prompts must be drawn again."""
        if self.args.save is None:
            return
        with self._state_lock:
            horizon = rollout_id - getattr(self.args, "rollouts_ahead", 0)
            self._before = {number: kept for number, kept in self._before.items() if number >= horizon}
            is_held = getattr(self.data_source, "holder", None) is not None
            keeps = hasattr(self.data_source, "freeze") and not is_held
            self._before[rollout_id] = _Before(self.data_source.state() if keeps else None, host_random_state())

    def _serving(self) -> AbstractContextManager[None]:
        return self._engines.serving() if self._engines is not None else nullcontext()

    def _samples(self, rollout_id: int) -> list[Sample]:
        if (template := self.args.load_debug_rollout_data) is not None:
            share = self.args.load_debug_rollout_data_subsample
            return debug_dumps.load_debug_rollout_data(template, rollout_id, subsample=share)
        started = time.perf_counter()
        with self._serving():
            output: RolloutFnTrainOutput = call_rollout_fn(
                self._generate_rollout, self.args, rollout_id, self.data_source, evaluation=False
            )
        validate_rollout_id_annotated(output.samples)
        samples = flatten_samples(output.samples)
        self._ledger = take_ledger_line(self.data_source, rollout_id, output)
        ages = staleness_metrics([staleness(sample, rollout_id) for sample in samples])
        metrics = ages | dict(output.metrics or {})
        log_rollout_data(rollout_id, self.args, samples, metrics, time.perf_counter() - started)
        return samples


class _EnginesUse:
    """Rollouts and evaluations take turns: a rollout that is full ends whatever is in flight, of evaluations too.

    An evaluation that waits goes first, because the driver waits for it.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._evaluations, self._is_making = 0, False

    @contextmanager
    def for_a_rollout(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: self._evaluations == 0)
            self._is_making = True
        try:
            yield
        finally:
            with self._condition:
                self._is_making = False
                self._condition.notify_all()

    @contextmanager
    def for_an_evaluation(self) -> Iterator[None]:
        with self._condition:
            self._evaluations += 1
            self._condition.wait_for(lambda: not self._is_making)
        try:
            yield
        finally:
            with self._condition:
                self._evaluations -= 1
                self._condition.notify_all()


class _Counter:
    """Stands where a progress bar would: the driver, which has a terminal, draws it."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self._show, self._done = show, 0

    def update(self, count: int = 1) -> None:
        self._done += count
        self._show(self._done)


RolloutManager = ray.remote(concurrency_groups=THREADS | _MAKING)(RolloutController)
