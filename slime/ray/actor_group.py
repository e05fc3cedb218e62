"""All ranks of one trainer, spoken to as one."""

from argparse import Namespace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from slime.backends.sglang.launch import shared_nccl_settings
from slime.observability.run_status import ProcessInfo
from slime.ray import cluster
from slime.ray.engine_specs import keeps_its_size
from slime.ray.engines import EngineRecord
from slime.ray.liveness import THREADS
from slime.ray.train_actor import TrainRayActor
from slime.ray.utils import thread_env
from slime.ray.waiting import wait_for
from slime.weight_sync.sync import SyncReport

_DEVICE_SHARE = 0.4  # of a device; the engine on a shared device takes less than the rest

_START_TIMEOUT_S = 600.0
_SAVE_TIMEOUT_S = 3600.0
_SAVE_GRACE_S = 60.0  # in which the ranks say themselves who is late
_TRAIN_ENV = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
    "HF_HUB_OFFLINE": "1",
}


class RayTrainGroup:
    """A trainer: one actor a device of `devices`. Its verbs return when every rank is done."""

    def __init__(self, args: Namespace, devices: Any, role: str = "actor") -> None:
        self._args, self._devices, self._role = args, devices, role
        self._actors: list[Any] = []
        self._is_loaded = False
        self._version = int(getattr(args, "update_weight_start_version", 0) or 0)

        self.has_trained_since_sync = False
        """The trainer's weights are not those that it gave to the engines last."""

    @property
    def weight_version(self) -> int:
        """Version that the engines hold since the last sync (0: none yet)."""
        return self._version

    def continue_versions(self, newest: int) -> None:
        """Count on after a resume: samples kept from before carry versions up to that many."""
        self._version = max(self._version, newest)

    def begin(self) -> None:
        """Start all ranks' processes, which import what they will need and take nothing of their devices; not awaited.

        Does nothing when they run.
        """
        if self._actors:
            return
        world_size = len(self._devices.bundles)
        env = thread_env(self._args.train_threads) | _TRAIN_ENV | shared_nccl_settings(self._args)
        env |= dict(self._args.train_env_vars or {})
        resource = cluster.device_resource(self._args)
        share = {"num_gpus": _DEVICE_SHARE} if resource == "GPU" else {"resources": {resource: _DEVICE_SHARE}}
        for rank, bundle in enumerate(self._devices.bundles):
            options = {
                "num_cpus": _DEVICE_SHARE,
                "runtime_env": {"env_vars": env | self._visible_device(rank)},
                "scheduling_strategy": PlacementGroupSchedulingStrategy(
                    placement_group=self._devices.group,
                    placement_group_bundle_index=bundle,
                ),
                **share,
            }
            self._actors.append(
                ray.remote(concurrency_groups=THREADS)(TrainRayActor)
                .options(**options)
                .remote(self._args, rank, world_size, self._role)
            )
            self._actors[-1].prepare.remote()

    def create(self, rollout_manager: Any = None) -> list[int]:
        """Start all ranks and load the model; returns each rank's first rollout id. Does nothing when it is loaded."""
        if self._is_loaded:
            return []
        self.begin()
        host, port = self._call("get_master_addr_and_port", what="start", timeout_s=_START_TIMEOUT_S)[0]
        start_ids = self._call("init", host, port, what="load the model")
        self._is_loaded = True
        if rollout_manager is not None:
            (config,) = wait_for({self._name(0): self._actors[0].parallel_config.remote()}, "tell its layout")
            wait_for(
                {"the rollout manager": rollout_manager.set_train_parallel_config.remote(config)}, "take the layout"
            )
        return start_ids

    def actors(self) -> dict[str, Any]:
        """Name -> actor of each rank."""
        return {self._name(rank): actor for rank, actor in enumerate(self._actors)}

    def processes(self) -> list[ProcessInfo]:
        """One process a rank."""
        found = self._call("pid_and_host", what="tell its pid", timeout_s=60)
        return [ProcessInfo(self._name(rank), "trainer", pid, host) for rank, (pid, host) in enumerate(found)]

    def train(self, rollout_id: int, shards: list[Any]) -> dict[str, float]:
        """Train on one rollout; metrics of rank 0, which are complete."""
        self.has_trained_since_sync = True
        return self._call("train", rollout_id, shards, what=f"train on rollout {rollout_id}")[0]

    def connect_engines(self, engines: list[EngineRecord]) -> None:
        self._call("connect_engines", engines, what="connect to the engines")

    def update_weights(self) -> SyncReport:
        """Give the engines the next version of the weights, proved; what the sync did."""
        report: SyncReport = self._call(
            "update_weights",
            self._version + 1,
            what=f"sync weights version {self._version + 1}",
        )[0]
        self._version += 1
        self.has_trained_since_sync = False
        return report

    def send_weights_again(self) -> None:
        """Give engines that were started again the version that the others have."""
        self._call("update_weights", self._version, what=f"sync weights version {self._version} to restarted engines")

    def save_model(self, rollout_id: int) -> None:
        self._call(
            "save_model",
            rollout_id,
            what=f"save the checkpoint of rollout {rollout_id}",
        )

    def finish_saves(self, timeout_s: float | None = _SAVE_TIMEOUT_S) -> None:
        """Wait until what --async-save writes in the background counts as the newest checkpoint."""
        deadline_s = None if timeout_s is None else timeout_s + _SAVE_GRACE_S
        self._call("finish_saves", timeout_s, what="finish the checkpoint", timeout_s=deadline_s)

    def save_hf(self, path: str) -> None:
        self._call("save_hf", path, what=f"export to {path}")

    def offload(self) -> None:
        """Give back the memory that only training needs, all but the weights that a sync reads."""
        self._call("sleep", True, what="release memory")

    def offload_weights(self) -> None:
        """After the sync: give back what `offload` left."""
        self._call("sleep", what="release memory")

    def onload(self) -> None:
        self._call("wake_up", what="take memory back")

    def make_room(self) -> None:
        """Before an engine starts beside it: give back what its allocators keep for later."""
        if keeps_its_size(self._args):
            self._call("empty_cache", what="give back unused memory")

    def close(self) -> None:
        """End all ranks."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._is_loaded = [], False

    def _visible_device(self, rank: int) -> dict[str, str]:
        device_id = self._devices.device_ids[rank]
        return {} if device_id < 0 else {"CUDA_VISIBLE_DEVICES": str(device_id)}

    def _name(self, rank: int) -> str:
        return f"{self._role} rank {rank}"

    def _call(self, method: str, *method_args: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        calls = {
            self._name(rank): getattr(actor, method).remote(*method_args) for rank, actor in enumerate(self._actors)
        }
        return wait_for(calls, what, timeout_s)
