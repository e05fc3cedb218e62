"""Flags that say which devices a run uses and how training and generation share them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ClusterConfig:
    """Cluster and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run. auto: CUDA where a GPU is found (looked for without importing torch), else the CPU."""
    cpu_devices: int | None = None
    """How many CPU devices placement may hand out, on a machine without a GPU. Default: 4 a core."""
    actor_num_nodes: int = 1
    """Nodes that train the actor."""
    actor_num_gpus_per_node: int = 8
    """Devices (and so trainer ranks) on each of these nodes. On the CPU the default is 1."""
    rollout_num_gpus: int | None = None
    """Devices for generation, all engines together. With --colocate: the actor's devices. On the CPU the default
    is 1. 0, with --debug-rollout-only: routers only."""
    rollout_num_gpus_per_engine: int = 1
    """Devices of one engine (SGLang: tensor parallel size x pipeline parallel size)."""
    num_gpus_per_node: int = 8
    """GPUs of a node. An engine that needs more fills whole nodes, so say it where nodes have another number."""
    colocate: bool = False
    """Training and generation take turns on the same devices; each releases its memory for the other, unless both fit
    on the GPU, which the plan says."""
    offload: bool = False
    """Short for --offload-train and --offload-rollout."""
    offload_train: bool | None = None
    """Move the trainer's memory off the devices while generating. Default: on with --colocate, unless both fit on the
    GPU, which the plan says."""
    offload_rollout: bool | None = None
    """Release the engines' memory while training. Default: on with --colocate, unless both fit on the GPU."""
    distributed_backend: str = "nccl"
    """Backend of the trainer's process groups. On the CPU it is gloo."""
    distributed_timeout_minutes: int = 10
    """Deadline of a collective between trainer ranks, in minutes."""
    train_backend: Literal["megatron"] = "megatron"
    """What trains."""


@dataclass(frozen=True)
class RunConfig:
    """The run: its name, its folder, what is printed before it starts."""

    output_dir: str = "outputs"
    """Folder of all runs; one run writes to <output-dir>/<run-name>."""
    run_name: str | None = None
    """Name of this run. Default: made of model, algorithm and time. A run is resumed by giving its name."""
    dry_run: bool = False
    """Print the plan (processes, devices, threads, batches, steps, paths) and start nothing."""
    custom_config_path: str | None = None
    """YAML mapping whose entries become attributes of `args`, over what the command line says."""
    keep_last: int | None = None
    """How many checkpoints to keep; older ones are deleted. Exports of --save-hf are kept. Default: all."""


@dataclass(frozen=True)
class NetworkConfig:
    """Network."""

    http_proxy: str | None = None
    """Proxy for HTTP requests to the engines."""
    use_distributed_post: bool = False
    """Send HTTP requests to the engines from several Ray actors, one a node."""
