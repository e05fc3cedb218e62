"""A run from start to end: its processes, its clock and its log, and the verbs that `train.py` is written in."""

import contextlib
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import ray

from slime.config import ConfigError
from slime.observability import logging_utils
from slime.observability.digests import write_digests
from slime.observability.run_log import RunLog
from slime.observability.run_status import ProcessInfo, RunStatus
from slime.observability.timer import StepClock
from slime.ray import cluster
from slime.ray.placement_group import (
    create_placement_groups,
    create_rollout_manager,
    create_training_models,
    dispose,
)
from slime.ray.schedule import Schedule
from slime.ray.turns import Turns
from slime.ray.waiting import RemoteError, wait_for
from slime.ray.watch import Watch
from slime.utils.processes import ServerError
from slime.utils.run_marker import HungUp, RunMarker, deaf_to_ctrl_c, leaves_when_told
from slime.weight_sync.base import EngineError, WeightSyncError

logger = logging.getLogger(__name__)

_MANAGER = "the rollout manager"
_IN_WORDS = (RemoteError, WeightSyncError, EngineError, ServerError, ConfigError)
"""Errors whose message says what a person needs; their traceback would only hide it."""


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Turn an error that explains itself into a line on stderr and exit code 1 (130 for Ctrl-C, 129 for a hang-up).

    Set SLIME_LOG_LEVEL=DEBUG to see the traceback.
    """
    try:
        with leaves_when_told():
            yield
    except _IN_WORDS as error:
        logger.debug("the run ended by an error", exc_info=True)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        raise SystemExit(f"train.py: error: {error}{notes}") from None
    except HungUp:  # nobody is there to read a word
        raise SystemExit(128 + signal.SIGHUP) from None
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


class Run:
    """Trainer, engines and rollout manager of one run, started by entering and ended by leaving it.

    The verbs (`generate`, `train`, `save`, `sync`, `evaluate`) do one phase each, on whichever devices
    the run has: where trainer and engines share them, a phase hands them over before it begins.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._metrics: dict[str, float] = {}
        self._ledger: dict[str, Any] | None = None
        self._trained: int = -1  # the last rollout that the weights were trained on
        self._is_unfinished = False  # the line of the step before the first is still to be written
        self._status: RunStatus | None = None
        self._clock = StepClock(on_change=self._show_phase)
        self._log: RunLog | None = None
        self._marker: RunMarker | None = None
        self._manager: Any = None
        self._actor: Any = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        """Close the log and end every process, whatever state the run is in; nothing is left ten seconds later."""
        with deaf_to_ctrl_c(), contextlib.ExitStack() as ends:  # runs all of them, last first, even if one fails
            if self._marker is not None:
                ends.callback(self._marker.finish)
            if self._status is not None:
                ends.callback(self._status.phase, "done")
            ends.callback(cluster.stop)
            if self._manager is not None:
                ends.callback(dispose, self._manager)
            if self._actor is not None:
                ends.callback(self._actor.close)
            if self._marker is not None:
                ends.callback(self._marker.leaving)
            if self._log is not None:  # before the clock of the end runs: a tracker may have to upload
                ends.callback(self._log.close)
                if error is None:
                    ends.callback(self._write_start)  # of a run without a step

    def _start(self) -> None:
        self._start_processes()
        self._connect()

    def _start_processes(self) -> None:
        args = self.args
        os.makedirs(args.run_dir, exist_ok=True)
        self._status = RunStatus(args.run_dir)
        logging_utils.configure_logger()
        logger.info("starting Ray, %s", "GPUs" if args.device == "cuda" else "CPU devices")
        self._marker = RunMarker.start(Path(args.run_dir) / "logs" / "reaper.log")
        cluster.start(args)
        self._log = RunLog(args.run_dir, args)
        groups = create_placement_groups(args)
        logger.info("starting engines (%s) and loading prompts", args.rollout_engine)
        self._manager, rollouts_per_epoch = create_rollout_manager(args, groups["rollout"])
        if args.debug_rollout_only:
            args.start_rollout_id = args.start_rollout_id or 0
        else:
            logger.info(
                "starting %d trainer rank(s), loading %s",
                len(groups["actor"].bundles),
                args.hf_checkpoint,
            )
            self._actor, _ = create_training_models(args, groups, self._manager)
        self._trained = args.start_rollout_id - 1
        unfinished = self._log.begin(args.start_rollout_id)
        self._is_unfinished = args.start_rollout_id == 0 or unfinished is not None
        self._metrics |= unfinished or {}
        self.schedule = Schedule.of(args, rollouts_per_epoch)
        self._turns = Turns(args, self._actor, self._manager)
        self._show_processes()

    def _connect(self) -> None:
        if self._actor is None or self.args.debug_train_only:
            return
        self._actor.connect_engines(ray.get(self._manager.engine_records.remote()))
        self.sync()

    # ---- one step of the loop ----

    @contextmanager
    def step(self, rollout_id: int) -> Iterator[None]:
        """One rollout and what belongs to it: its metrics become one line of the log."""
        self._write_start()
        if self._status is not None:
            self._status.rollout(rollout_id)
        yield
        self._write_log(rollout_id)

    def generate(self, rollout_id: int) -> list[Any] | None:
        """Rewarded samples of one rollout, as one shard a data-parallel rank."""
        with self._clock.phase("generate"), Watch(self._manager) as watch:
            shards = self._ask("generate", rollout_id, what=f"generate rollout {rollout_id}", watch=watch.look)
            self._metrics |= ray.get(self._manager.take_metrics.remote())
            self._ledger = ray.get(self._manager.take_ledger.remote())
        return shards

    def train(self, rollout_id: int, shards: list[Any] | None) -> None:
        """Train on the shards; nothing in --debug-rollout-only."""
        if self._actor is None or shards is None:
            return
        self._turns.to_trainer(self._clock)
        with self._clock.phase("train"):
            self._metrics |= self._actor.train(rollout_id, shards)
        self._trained = rollout_id

    def save(self, rollout_id: int) -> None:
        """Checkpoint of the model and of the prompts' position; the HuggingFace export when asked for."""
        if self._actor is None:
            return
        with self._clock.phase("save"):
            if self.args.save and self.args.save_interval:
                assert self._log is not None, "a save outside of `with Run(...)`"
                self._log.prepare(rollout_id, self._metrics, self._ledger)
                self._actor.save_model(rollout_id)
                if self.args.rollout_global_dataset:
                    self._ask("save", rollout_id, what="save the data position")
            if self.args.save_hf:
                self._actor.save_hf(self.args.save_hf.format(rollout_id=rollout_id))

    def sync(self) -> None:
        """Give the engines the trainer's weights, proved equal."""
        if self._actor is None or self.args.debug_train_only:
            return
        self._turns.to_engines(self._clock)
        with self._clock.phase("sync"):
            report = self._actor.update_weights()
            write_digests(self.args.run_dir, report.version, report.digests, self._trained)
            self._metrics |= report.metrics()
        self._turns.to_generation(self._clock)

    @property
    def missing_evaluation(self) -> int | None:
        """The rollout after which an evaluation is still due before the first step; None: nothing is due.

        That is -1 at the start, and the rollout of the checkpoint where a run was killed before it had evaluated it.
        """
        if self.schedule.evaluates_first:
            return -1
        last = self.schedule.start - 1
        return last if last >= 0 and self._is_unfinished and self.schedule.evaluates_after(last) else None

    def evaluate(self, rollout_id: int) -> None:
        """Run every evaluation task with the weights that the engines hold; -1 is before the first rollout."""
        with self._clock.phase("eval"), Watch(self._manager) as watch:
            self._ask("eval", rollout_id, what="evaluate", watch=watch.look)
            self._metrics |= ray.get(self._manager.take_metrics.remote())

    def _show_phase(self, name: str) -> None:
        if self._status is not None and name != "other":
            self._status.phase(name)

    def _show_processes(self) -> None:
        assert self._status is not None, "processes before the run was started"
        trainers = self._actor.processes() if self._actor is not None else []
        (others,) = wait_for({_MANAGER: self._manager.processes.remote()}, "tell its processes", 60)
        self._status.processes([ProcessInfo("driver", "driver", os.getpid()), *trainers, *others])

    def _write_start(self) -> None:
        """What came before the first step (set-up, sync, evaluation) is the line of the step before it.

        A resumed run has that line from before it ended, unless it was killed before it wrote it.
        """
        if self._metrics and self._is_unfinished:
            self._write_log(self.schedule.start - 1)
        elif self._metrics:
            self._clock.finish()
            self._metrics = {}
        self._is_unfinished = False

    def _write_log(self, rollout_id: int) -> None:
        assert self._log is not None, "a step outside of `with Run(...)`"
        self._log.step(rollout_id, self._metrics | self._clock.finish(), self._ledger)
        self._metrics, self._ledger = {}, None

    def _ask(self, method: str, *method_args: Any, what: str, watch: Callable[[], None] | None = None) -> Any:
        (result,) = wait_for({_MANAGER: getattr(self._manager, method).remote(*method_args)}, what, watch=watch)
        return result
