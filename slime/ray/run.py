"""A run from start to end: its processes, its clock and its log, and the verbs that `train.py` is written in."""

import contextlib
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slime.config import ConfigError
from slime.observability import logging_utils
from slime.observability.digests import write_digests
from slime.observability.run_log import RunLog
from slime.observability.run_status import ProcessInfo, RunStatus
from slime.observability.timer import StepClock
from slime.ray import cluster
from slime.ray.actor_group import RayTrainGroup
from slime.ray.leaving import Leaving, Preempted
from slime.ray.liveness import Liveness
from slime.ray.placement_group import (
    Devices,
    begin_training_models,
    create_placement_groups,
    create_rollout_manager,
    create_training_models,
    dispose,
    wait_until_started,
)
from slime.ray.repair import Repairs
from slime.ray.rollout import MadeRollout
from slime.ray.schedule import Schedule
from slime.ray.turns import Turns
from slime.ray.waiting import RemoteError, num_ready, set_look, wait_for
from slime.ray.watch import Watch
from slime.utils.processes import ServerError
from slime.utils.run_marker import HungUp, RunMarker, deaf_to_ctrl_c, leaves_when_told
from slime.weight_sync.base import EngineError, WeightSyncError
from slime.weight_sync.sync import SyncReport

logger = logging.getLogger(__name__)

_MANAGER = "the rollout manager"
_SYNC_RETRIES = 2  # of a sync that failed because an engine was lost
_IN_WORDS = (RemoteError, WeightSyncError, EngineError, ServerError, ConfigError)
"""Errors whose message says what a person needs; their traceback would only hide it."""


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Turn an error that explains itself into a line on stderr and exit code 1.

    Ctrl-C is 130, a hang-up 129, SIGTERM 143.

    Set SLIME_LOG_LEVEL=DEBUG to see the traceback.
    """
    try:
        with leaves_when_told():
            yield
    except _IN_WORDS as error:
        logger.debug("the run ended by an error", exc_info=True)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        raise SystemExit(f"{_program()}: error: {error}{notes}") from None
    except HungUp:  # nobody is there to read a word
        raise SystemExit(128 + signal.SIGHUP) from None
    except Preempted as preempted:
        print(f"{_program()}: {preempted}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from None
    except KeyboardInterrupt:
        print(f"{_program()}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def _program() -> str:
    name = os.path.basename(sys.argv[0])
    return name if name.endswith(".py") else "train.py"


class Run:
    """Trainer, engines and rollout manager of one run, started by entering and ended by leaving it.

    The verbs (`generate`, `train`, `save`, `sync`, `evaluate`) do one phase each, on whichever devices
    the run has: where trainer and engines share them, a phase hands them over before it begins. Where they do not,
    `generate_ahead` and `take` are the two halves of `generate`, and the others may come between them.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self._metrics: dict[str, float] = {}
        self._ledger: dict[str, Any] | None = None
        self._is_unfinished = False  # the line of the step before the first is still to be written
        self._status: RunStatus | None = None
        self._clock = StepClock(on_change=self._show_phase)
        self._log: RunLog | None = None
        self._marker: RunMarker | None = None
        self._manager: Any = None
        self._actor: Any = None
        self._trained = self._saved = self._logged = self._begun = -1
        """Last rollouts that were trained on, saved, written to the log, and asked for."""
        self._making: dict[int, Any] = {}
        """Rollouts that were asked for and not taken."""
        self._leaving = Leaving()
        self._liveness = Liveness("the driver", args.liveness_timeout)
        self._watch = Watch(self._clock, self._liveness, self._leaving)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the log and end every process, whatever state the run is in; nothing is left ten seconds later.

        After SIGTERM, save before.
        """
        with deaf_to_ctrl_c(), contextlib.ExitStack() as ends:  # runs all of them, last first, even if one fails
            if self._marker is not None:
                ends.callback(self._marker.finish)
            if self._status is not None:
                ends.callback(self._status.phase, "done" if kind is None else "failed")
            ends.callback(self._leaving.restore)
            ends.callback(cluster.stop)
            if self._manager is not None:
                ends.callback(dispose, self._manager)
            if self._actor is not None:
                ends.callback(self._actor.close)
            if self._marker is not None:
                ends.callback(self._marker.leaving)
            ends.callback(self._liveness.close)
            ends.callback(set_look, None)
            if self._log is not None:  # before the clock of the end runs: a tracker may have to upload
                ends.callback(self._log.close)
                if error is None:
                    ends.callback(self._write_start)  # of a run without a step
            self._watch.close_bar()
            if isinstance(error, Preempted):
                error.args = (self._save_before_leaving(),)

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
        self._leaving.install()  # after Ray, which takes the signal for itself
        self._log = RunLog(args.run_dir, args)
        self._liveness.start()
        set_look(self._watch.look)
        groups = create_placement_groups(args)
        rollouts_per_epoch = self._start_engines_and_trainer(groups)
        unfinished = self._log.begin(args.start_rollout_id)
        self._is_unfinished = args.start_rollout_id == 0 or unfinished is not None
        self._metrics |= unfinished or {}
        self.schedule = Schedule.of(args, rollouts_per_epoch)
        self._trained = self._saved = self._logged = self._begun = self.schedule.start - 1
        if not args.debug_train_only:
            self._watch.repairs = Repairs(args, self._manager, self._actor, self._show_processes, self._new_version)
        self._watch.manager = self._manager
        self._show_processes()

    def _start_engines_and_trainer(self, groups: dict[str, Devices]) -> int | None:
        """Both load at the same time, unless engines have to make room for the trainer; the rollouts of an epoch."""
        args = self.args
        logger.info("starting engines (%s) and loading prompts", args.rollout_engine)
        self._manager, starting = create_rollout_manager(args, groups["rollout"])
        self._liveness.watch(_MANAGER, self._manager)
        self._turns = Turns(args, self._manager)
        # SGLang takes its share of what is free when it starts, so a trainer on the same GPU comes after it.
        shares_gpu = args.colocate and args.device == "cuda"
        waits = shares_gpu or args.offload_rollout or args.num_rollout is None or args.debug_rollout_only
        # What a trainer imports it can import meanwhile; it is told the number of rollouts when its process starts.
        begins = waits and args.num_rollout is not None and not args.debug_rollout_only
        begun = self._begin_trainer(groups) if begins else None
        rollouts_per_epoch = wait_until_started(args, self._manager, starting) if waits else None
        if args.debug_rollout_only:
            args.start_rollout_id = args.start_rollout_id or 0
        else:
            self._turns.to_loading(self._clock)
            self._start_trainer(groups, begun)
        if not waits:
            rollouts_per_epoch = wait_until_started(args, self._manager, starting)
        if self._actor is not None and args.start_rollout_id > 0:
            self._actor.continue_versions(self._ask("load", args.start_rollout_id - 1, what="load the data position"))
        return rollouts_per_epoch

    def _start_trainer(self, groups: dict[str, Devices], begun: RayTrainGroup | None) -> None:
        num_ranks = len(groups["actor"].bundles)
        logger.info("starting %d trainer rank(s), loading %s", num_ranks, self.args.hf_checkpoint)
        begun = begun or self._begin_trainer(groups)
        self._actor, _ = create_training_models(self.args, groups, self._manager, begun)
        self._turns.trainer = self._actor

    def _begin_trainer(self, groups: dict[str, Devices]) -> RayTrainGroup:
        begun = begin_training_models(self.args, groups)
        for name, actor in begun.actors().items():
            self._liveness.watch(name, actor, is_loading=True)
        return begun

    def _connect(self) -> None:
        if self._actor is None or self.args.debug_train_only:
            return
        self._export_what_was_cut_off()
        self._actor.connect_engines(self._ask("engine_records", what="list its engines"))
        self.sync()

    def _export_what_was_cut_off(self) -> None:
        """A run that was killed between a checkpoint and its export goes on after both, so the export is made now."""
        if not self.args.save_hf or self.args.load != self.args.save or not self.schedule.saved_before_start:
            return
        folder = self.args.save_hf.format(rollout_id=self.schedule.start - 1)
        if not Path(folder).exists():
            logger.info("exporting to %s, which the run had no time for", folder)
            with self._clock.phase("save"):
                self._actor.save_hf(folder)

    # ---- one step of the loop ----

    @contextmanager
    def step(self, rollout_id: int) -> Iterator[None]:
        """One rollout and what belongs to it: its metrics become one line of the log."""
        self._write_start()
        if self._status is not None:
            self._status.rollout(rollout_id)
        if self._watch.repairs is not None:
            self._watch.repairs.begin_rollout()
        yield
        self._write_log(rollout_id)
        self._leaving.raise_if_asked()

    def generate(self, rollout_id: int) -> list[Any] | None:
        """Rewarded samples of one rollout, as one shard a data-parallel rank."""
        with self._clock.phase("generate"):
            self._ask_for(rollout_id)
            return self._taken(rollout_id)

    def generate_ahead(self, rollout_id: int) -> None:
        """Let rollouts be made from now on, up to --async-buffer-size after `rollout_id`; returns at once.

        A rollout function that keeps groups in flight by itself is asked for one rollout at a time.
        """
        for number in range(self._begun + 1, min(rollout_id + self.args.rollouts_ahead, self.schedule.stop - 1) + 1):
            self._ask_for(number)

    def take(self, rollout_id: int) -> list[Any] | None:
        """What `generate` gives, of a rollout that was begun ahead: waits only for what is not made yet."""
        with self._clock.phase("wait_for_rollout"):
            if rollout_id not in self._making:
                self._ask_for(rollout_id)
            shards = self._taken(rollout_id)
        self._metrics["rollout/ready_ahead"] = num_ready(self._making.values())
        return shards

    def _ask_for(self, rollout_id: int) -> None:
        self._making[rollout_id] = self._manager.make.remote(rollout_id)
        self._begun = rollout_id

    def _taken(self, rollout_id: int) -> list[Any] | None:
        made: MadeRollout
        (made,) = wait_for({_MANAGER: self._making.pop(rollout_id)}, f"generate rollout {rollout_id}")
        self._watch.close_bar()
        self._metrics |= made.metrics
        self._ledger = made.ledger
        return made.shards

    def train(self, rollout_id: int, shards: list[Any] | None) -> None:
        """Train on the shards; nothing in --debug-rollout-only."""
        if self._actor is None or shards is None:
            return
        self._turns.to_trainer(self._clock)
        with self._clock.phase("train"):
            self._metrics |= self._actor.train(rollout_id, shards)
        self._trained = rollout_id

    def save(self, rollout_id: int) -> None:
        """Checkpoint of the prompts' position, then of the model, which makes it count; the HuggingFace export
        when asked for. With --async-save it counts when a later verb of the trainer finds it written."""
        if self._actor is None:
            return
        with self._clock.phase("save"):
            if self.args.save and self.args.save_interval:
                self._save_checkpoint(rollout_id)
            if self.args.save_hf:
                self._actor.save_hf(self.args.save_hf.format(rollout_id=rollout_id))
            if rollout_id == self.schedule.stop - 1:
                self._finish_saves()

    def _save_checkpoint(self, rollout_id: int) -> None:
        """The step's record and the prompts' position first: once the trainer has written its part, it all counts."""
        assert self._log is not None, "a save outside of `with Run(...)`"
        if self._logged != rollout_id:
            self._log.prepare(rollout_id, self._metrics, self._ledger)
        self._finish_saves()
        self._log.put_to_disk()
        self._ask("save", rollout_id, what="save the data position")
        self._actor.save_model(rollout_id)
        self._saved = rollout_id

    def _finish_saves(self) -> None:
        """Wait until what --async-save still writes counts."""
        if self.args.async_save:
            self._actor.finish_saves()

    def _save_before_leaving(self) -> str:
        """Save what was trained since the last checkpoint; says what became of the run."""
        if self._actor is not None:
            self._finish_saves()
        if self._actor is None or self._trained == self._saved:
            return f"left after SIGTERM; nothing was trained since {self._last_checkpoint()}."
        if not self.args.save:
            return f"left after SIGTERM; rollout {self._trained} is lost, as there is no --save folder."
        self._leaving.is_asked = False
        with self._clock.phase("save"):
            self._ask("stop_generating", what="end its requests")
        self._turns.to_trainer(self._clock)
        with self._clock.phase("save"):
            self._save_checkpoint(self._trained)
            self._finish_saves()
        return f"left after SIGTERM; saved {self._last_checkpoint()}. The same command line goes on from there."

    def _last_checkpoint(self) -> str:
        return f"rollout {self._saved} in {self.args.save}" if self._saved >= 0 and self.args.save else "the start"

    def sync(self) -> None:
        """Give the engines the trainer's weights, proved equal; an engine that is lost meanwhile is started again."""
        if self._actor is None or self.args.debug_train_only:
            return
        assert self._watch.repairs is not None, "a sync without engines"
        self._turns.to_engines(self._clock)
        with self._clock.phase("sync"):
            self._watch.repairs.start_lost_before_a_sync()
            report = self._synced(self._watch.repairs)
            self._metrics |= report.metrics()
            self._watch.repairs.admit()
        self._turns.to_generation(self._clock)

    def _synced(self, repairs: Repairs) -> SyncReport:
        for _ in range(_SYNC_RETRIES):
            try:
                return self._new_version()
            except RemoteError as error:
                logger.warning("%s", error)
                if not repairs.restart_lost():
                    raise
        return self._new_version()

    def _new_version(self) -> SyncReport:
        """The trainer's weights in every engine; requests in flight meet them as --pause-generation-mode says."""
        self._ask("begin_weight_update", what="hold its requests")
        report: SyncReport = self._actor.update_weights()
        write_digests(self.args.run_dir, report.version, report.digests, self._trained)
        self._ask("end_weight_update", report.version, self._trained + 1, what="let its requests go on")
        return report

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
        with self._clock.phase("eval"):
            self._metrics |= self._ask("eval", rollout_id, what="evaluate")
            self._watch.close_bar()

    def _show_phase(self, name: str) -> None:
        if self._status is not None and name != "other":
            self._status.phase(name)

    def _show_processes(self) -> None:
        assert self._status is not None, "processes before the run was started"
        trainers = self._actor.processes() if self._actor is not None else []
        (others,) = wait_for({_MANAGER: self._manager.processes.remote()}, "tell its processes", 60)
        self._status.processes([ProcessInfo("driver", "driver", os.getpid()), *trainers, *others])
        for process in (*trainers, *others):
            name = _MANAGER if process.role == "manager" else process.name
            self._liveness.introduce(name, process.pid, process.host)

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
        times = self._clock.finish()
        if "perf/wait_for_rollout_time" in times and times["perf/step_time"] > 0:
            times["perf/wait_time_ratio"] = times["perf/wait_for_rollout_time"] / times["perf/step_time"]
        self._log.step(rollout_id, self._metrics | times, self._ledger)
        self._metrics, self._ledger, self._logged = {}, None, rollout_id

    def _ask(self, method: str, *method_args: Any, what: str) -> Any:
        (result,) = wait_for({_MANAGER: getattr(self._manager, method).remote(*method_args)}, what)
        return result
