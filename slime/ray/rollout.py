"""The rollout manager: owns engines, prompts and rewards, and turns a rollout id into training shards."""

import logging
import time
from argparse import Namespace
from typing import Any

import ray

from slime.data.batch import convert_samples_to_train_data, split_train_data_by_dp
from slime.observability import debug_dumps, logging_utils
from slime.observability.rollout_metrics import eval_metrics, rollout_metrics
from slime.observability.samples import write_samples
from slime.ray.engines import EngineRecord, Engines
from slime.rollout.base_types import (
    RolloutFnEvalOutput,
    RolloutFnTrainOutput,
    call_rollout_fn,
)
from slime.rollout.sample_hooks import set_current_rollout_id
from slime.utils.http_utils import init_http_client
from slime.utils.misc import Box, load_function
from slime.utils.types import Sample

logger = logging.getLogger(__name__)


class RolloutController:
    """What the manager does, as a plain class: `RolloutManager` is the same as a Ray actor."""

    def __init__(self, args: Namespace, devices: Any) -> None:
        logging_utils.configure_logger(prefix="rollout")
        logging_utils.init_tracking(args, primary=False)
        self.args = args
        self._parallel_config: dict[str, int] = {}
        self._metrics: dict[str, float] = {}
        self._engines: Engines | None = None
        if not args.debug_train_only:
            self._engines = Engines(args, devices)
            self._engines.start()
            init_http_client(args)
        self.data_source = load_function(args.data_source_path)(args)
        self._generate_rollout = load_function(args.rollout_function_path)
        self._eval_rollout = load_function(args.eval_function_path)

    # ---- what the driver asks ----

    def get_num_rollout_per_epoch(self) -> int | None:
        if not self.args.rollout_global_dataset:
            return None
        return len(self.data_source) // self.args.rollout_batch_size

    def set_train_parallel_config(self, config: dict[str, int]) -> None:
        """Learn how the trainer splits data (dp_size, cp_size, vpp_size, ...)."""
        self._parallel_config = dict(config)

    def engine_records(self) -> list[EngineRecord]:
        return self._engines.records if self._engines else []

    def check_engines(self) -> None:
        """Raise if an engine or the router has died."""
        if self._engines is not None:
            self._engines.check_alive()

    def generate(self, rollout_id: int) -> list[Box] | None:
        """Make one rollout; one `Box(ObjectRef)` a data-parallel rank, or None when nothing is to be trained."""
        set_current_rollout_id(rollout_id)
        started = time.perf_counter()
        samples, extra = self._samples(rollout_id)
        elapsed_s = time.perf_counter() - started
        debug_dumps.save_rollout_data(self.args, rollout_id, samples)
        self._log_rollout(rollout_id, samples, extra, elapsed_s)
        if self.args.debug_rollout_only:
            return None
        train_data = convert_samples_to_train_data(self.args, samples)
        shards = split_train_data_by_dp(self.args, train_data, self._parallel_config)
        return [Box(ray.put(shard)) for shard in shards]

    def eval(self, rollout_id: int) -> dict[str, float]:
        """Evaluate on every task; the metrics, which are also kept for `take_metrics`."""
        if self.args.debug_train_only:
            return {}
        started = time.perf_counter()
        output: RolloutFnEvalOutput = call_rollout_fn(
            self._eval_rollout, self.args, rollout_id, self.data_source, evaluation=True
        )
        flat = [
            sample
            for task in output.data.values()
            for sample in task.get("samples") or []
        ]
        debug_dumps.save_rollout_data(self.args, f"eval_{rollout_id}", flat)
        for task, result in output.data.items():
            if result.get("samples"):
                write_samples(
                    self.args.run_dir, rollout_id, result["samples"], task=task
                )
        path = self.args.custom_eval_rollout_log_function_path
        if path is None or not load_function(path)(
            rollout_id, self.args, output.data, output.metrics
        ):
            self._metrics |= eval_metrics(self.args, output.data, output.metrics)
        self._metrics["perf/eval_rollout_time"] = time.perf_counter() - started
        return dict(self._metrics)

    def take_metrics(self) -> dict[str, float]:
        """Metrics since the last call, those that hooks logged included."""
        metrics = self._metrics | logging_utils.take_pending()
        self._metrics = {}
        return metrics

    def save(self, rollout_id: int) -> None:
        self.data_source.save(rollout_id)

    def load(self, rollout_id: int | None = None) -> None:
        self.data_source.load(rollout_id)

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
        self.onload(["kv_cache"])

    def dispose(self) -> None:
        """End engines and router."""
        if self._engines is not None:
            self._engines.stop()
            self._engines = None

    # ---- one rollout ----

    def _samples(self, rollout_id: int) -> tuple[list[Sample], dict[str, float] | None]:
        if self.args.load_debug_rollout_data is not None:
            return debug_dumps.load_rollout_data(self.args, rollout_id), None
        output: RolloutFnTrainOutput = call_rollout_fn(
            self._generate_rollout,
            self.args,
            rollout_id,
            self.data_source,
            evaluation=False,
        )
        return list(_flatten(output.samples)), output.metrics

    def _log_rollout(
        self,
        rollout_id: int,
        samples: list[Sample],
        extra: dict[str, float] | None,
        elapsed_s: float,
    ) -> None:
        if self.args.load_debug_rollout_data is not None:
            return
        write_samples(self.args.run_dir, rollout_id, samples)
        path = self.args.custom_rollout_log_function_path
        if path is None or not load_function(path)(
            rollout_id, self.args, samples, extra, elapsed_s
        ):
            self._metrics |= rollout_metrics(self.args, samples, extra, elapsed_s)


def _flatten(samples: Any) -> Any:
    for item in samples:
        if isinstance(item, list):
            yield from _flatten(item)
        else:
            yield item


RolloutManager = ray.remote(RolloutController)
