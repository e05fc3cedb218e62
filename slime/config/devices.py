"""Which devices, engine and number format a run takes, and how many threads each process gets: pure arithmetic."""

from dataclasses import dataclass
from typing import Literal

from slime.config.config import Config
from slime.config.engine_groups import EngineGroup, engine_groups, gpus_of_file
from slime.config.errors import ConfigError

CPU_DEVICES_PER_CORE = 4


@dataclass(frozen=True)
class Choice:
    """A decision and the reason for it, which the plan shows."""

    value: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """Processes on devices.

    `train_threads` are those of one trainer rank, `rollout_threads` those of one engine.
    """

    device: Literal["cpu", "cuda"]
    actor_num_nodes: int
    actor_num_gpus_per_node: int
    rollout_num_gpus: int
    rollout_num_gpus_per_engine: int
    num_engines: int
    colocate: bool
    offload_train: bool
    offload_rollout: bool
    devices_needed: int
    devices_available: int | None
    """None when a Ray cluster that runs already decides it."""
    engine_groups: tuple[EngineGroup, ...]
    """Engines that are started, by kind, in the order of their devices."""
    cores: int
    train_threads: int
    rollout_threads: int
    engine_memory_fraction: float | None = None
    """Of a GPU that is shared with a trainer which stays there; None where SGLang or the user decides."""

    @property
    def world_size(self) -> int:
        """Trainer ranks."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node


@dataclass(frozen=True)
class Parallel:
    """The trainer's parallel sizes; their product over tensor, pipeline, context and data is the world size."""

    tensor: int
    pipeline: int
    context: int
    data: int
    expert: int
    virtual_pipeline: int | None


def choose_device(config: Config) -> Choice:
    """cuda where it is asked for or a GPU is found, else cpu."""
    asked, num_gpus = config.cluster.device, config.machine.num_gpus
    if asked != "auto":
        return Choice(asked, f"--device {asked}")
    if num_gpus:
        return Choice("cuda", f"{num_gpus} NVIDIA GPU(s) found")
    return Choice("cpu", "no NVIDIA GPU found")


def choose_engine(config: Config, device: str) -> Choice:
    """SGLang where a GPU and SGLang are, else the embedded engine; what is asked for comes first."""
    asked = config.engine.rollout_engine
    if config.is_external:
        return Choice("sglang", "--rollout-external-engine-addrs")
    if asked != "auto":
        return Choice(asked, f"--rollout-engine {asked}")
    if device == "cuda" and (config.machine.has_sglang or config.machine.joins_cluster):
        return Choice("sglang", "a GPU and SGLang are there")
    if device == "cpu":
        return Choice("embedded", "on the CPU" if config.machine.num_gpus else "no GPU")
    return Choice("embedded", "the package sglang is not installed")


def choose_dtype(config: Config, device: str) -> Choice:
    """bf16, fp16 or fp32 for weights and activations; on a CPU bf16 only where it has the instructions."""
    megatron, given = config.megatron, config.given
    if megatron.get("fp16"):
        return Choice("fp16", "--fp16")
    if "bf16" in given and not megatron.get("bf16"):
        if device == "cuda":
            raise ConfigError(
                "--no-bf16 leaves float32, in which the attention kernels of GPUs do not compute; "
                "leave it out, or give --fp16"
            )
        return Choice("fp32", "--no-bf16")
    if device == "cuda":
        return Choice("bf16", "--bf16" if "bf16" in given else "GPU")
    if config.machine.has_bf16:
        return Choice("bf16", f"the CPU has {' and '.join(config.machine.cpu_instructions)}")
    asked = "--bf16 was asked for, but " if megatron.get("bf16") else ""
    return Choice("fp32", f"{asked}the CPU has neither avx512_bf16 nor amx_bf16")


def place(config: Config, device: Choice, engine: Choice) -> Placement:
    """Devices and threads of trainer and engines.

    Raises:
        ConfigError: the numbers do not go together, or the machine has too few devices (with both numbers).
    """
    cluster, debug = config.cluster, config.debug
    per_node = cluster.actor_num_gpus_per_node
    if device.value == "cpu" and "actor_num_gpus_per_node" not in config.given:
        per_node = 1
    nodes = cluster.actor_num_nodes
    rollout = _rollout_devices(config, device.value, nodes * per_node)
    if debug.debug_rollout_only and not config.is_external:
        per_node = min(8, rollout)
        nodes = rollout // per_node if per_node else 0
    colocate = cluster.colocate and not debug.debug_rollout_only
    groups = () if config.is_external or config.skips_engines else engine_groups(config, rollout)
    if engine.value == "embedded" and (config.engine.sglang_config or config.engine.prefill_num_servers):
        flag = "--sglang-config" if config.engine.sglang_config else "--prefill-num-servers"
        raise ConfigError(
            f"{flag} describes SGLang servers, but the embedded engine generates ({engine.reason}); drop it, or type "
            "--rollout-engine sglang"
        )
    num_engines = _num_engines(config, rollout, groups)
    if config.machine.joins_cluster and device.value == "cuda":
        _check_where_engines_begin(config, groups, 0 if colocate or debug.debug_rollout_only else nodes * per_node)
    ranks_here = per_node if config.machine.joins_cluster and device.value == "cuda" else nodes * per_node
    train_threads, rollout_threads = _threads(config, engine.value, ranks_here, num_engines)
    offload_train, offload_rollout = _offloads(config, colocate)
    placement = Placement(
        device="cuda" if device.value == "cuda" else "cpu",
        actor_num_nodes=nodes,
        actor_num_gpus_per_node=per_node,
        rollout_num_gpus=rollout,
        rollout_num_gpus_per_engine=cluster.rollout_num_gpus_per_engine,
        num_engines=num_engines,
        colocate=colocate,
        offload_train=offload_train,
        offload_rollout=offload_rollout,
        devices_needed=_needed(config, nodes * per_node, rollout, colocate),
        devices_available=_available(config, device.value),
        engine_groups=groups,
        cores=config.machine.cores,
        train_threads=train_threads,
        rollout_threads=rollout_threads,
    )
    _check_enough(config, placement)
    return placement


def _rollout_devices(config: Config, device: str, actor_devices: int) -> int:
    given = config.cluster.rollout_num_gpus
    if config.skips_engines:
        return given or 0
    if given is not None:
        return given
    if config.is_external:
        return 0
    if config.engine.sglang_config is not None:
        return gpus_of_file(config)
    if config.cluster.colocate or config.debug.debug_rollout_only:
        return actor_devices
    if device == "cpu":
        return config.cluster.rollout_num_gpus_per_engine
    raise ConfigError(
        "--rollout-num-gpus is missing: say how many GPUs generate (e.g. --rollout-num-gpus 8), or let training and "
        "generation take turns on the same ones with --colocate"
    )


def _num_engines(config: Config, rollout: int, groups: tuple[EngineGroup, ...]) -> int:
    if config.is_external:
        return len(config.rollout.rollout_external_engine_addrs or [])
    size = config.cluster.rollout_num_gpus_per_engine
    if config.skips_engines:
        return 0
    _check_nodes(config, groups)
    if config.engine.sglang_config is not None:
        return sum(group.num_engines for group in groups)
    if rollout % size:
        fits = " or ".join(str(n) for n in (rollout - rollout % size, rollout + size - rollout % size) if n)
        raise ConfigError(
            f"--rollout-num-gpus {rollout} is not a multiple of --rollout-num-gpus-per-engine {size}; use {fits}"
        )
    return rollout // size


def _check_nodes(config: Config, groups: tuple[EngineGroup, ...]) -> None:
    per_node = config.cluster.num_gpus_per_node
    for group in groups:
        size = group.num_gpus_per_engine
        if size > per_node and size % per_node:
            raise ConfigError(
                f"an engine of {size} devices does not fill nodes of --num-gpus-per-node {per_node}; give it "
                f"{size - size % per_node} or {size + per_node - size % per_node}, or say how many devices a node has"
            )


def _check_where_engines_begin(config: Config, groups: tuple[EngineGroup, ...], first: int) -> None:
    """An engine lies on one node, or on whole nodes; `first` is the position of the first engine's first device."""
    per_node = config.cluster.num_gpus_per_node
    index = 0
    for group in groups:
        size = group.num_gpus_per_engine
        for begin in range(first, first + group.num_engines * size, size):
            if begin % per_node + min(size, per_node) > per_node:
                raise ConfigError(
                    f"engine {index} of {size} devices begins at device {begin % per_node} of a node, and would lie on "
                    f"parts of two nodes of --num-gpus-per-node {per_node}: devices go to trainers first (unless "
                    f"--colocate), then to engines, and {begin} come before it; make that a multiple of "
                    f"{min(size, per_node)}, give engines fewer devices (--rollout-num-gpus-per-engine), or say how "
                    "many devices a node has"
                )
            index += 1
        first += group.num_gpus


def _threads(config: Config, engine: str, ranks: int, engines: int) -> tuple[int, int]:
    """Cores shared out over the processes that compute at the same time; where phases take turns, each gets all.

    The embedded engine decodes fastest with one thread, so it gets one.
    """
    cores = config.machine.cores
    is_alone = config.loop == "sync" or engines == 0
    rollout = 1 if engine == "embedded" else max(1, cores // max(1, engines) // (1 if is_alone else 2))
    left = cores if is_alone else max(1, cores - engines * rollout)
    return max(1, left // max(1, ranks)), rollout


def _offloads(config: Config, colocate: bool) -> tuple[bool, bool]:
    """Whether trainer and engines give up their memory for each other."""
    cluster = config.cluster
    if config.debug.debug_rollout_only:
        return False, False
    train = True if cluster.offload else cluster.offload_train
    rollout = True if cluster.offload else cluster.offload_rollout
    if colocate and config.train.release_train:
        return False, True
    if colocate:
        train, rollout = train is not False, rollout is not False
    if config.algorithm.advantage_estimator == "ppo":
        train = True
    return bool(train), bool(rollout) and not config.skips_engines


def _needed(config: Config, actor: int, rollout: int, colocate: bool) -> int:
    if config.skips_engines or config.is_external:
        return actor
    if config.debug.debug_rollout_only:
        return rollout
    return max(actor, rollout) if colocate else actor + rollout


def _available(config: Config, device: str) -> int | None:
    if config.machine.joins_cluster:
        return None
    if device == "cuda":
        return config.machine.num_gpus or None  # none at all: a rule says so
    return config.cluster.cpu_devices or CPU_DEVICES_PER_CORE * config.machine.cores


def _check_enough(config: Config, p: Placement) -> None:
    if p.devices_available is None or p.devices_needed <= p.devices_available:
        return
    kind = "GPUs" if p.device == "cuda" else "CPU devices (--cpu-devices)"
    share = "" if p.colocate else ", share devices with --colocate"
    more = "give more with --cpu-devices" if p.device == "cpu" else "join a cluster with RAY_ADDRESS"
    raise ConfigError(
        f"this run needs {p.devices_needed} devices (training: --actor-num-nodes {p.actor_num_nodes} x "
        f"--actor-num-gpus-per-node {p.actor_num_gpus_per_node}; generation: --rollout-num-gpus {p.rollout_num_gpus}"
        f"{'; on the same devices' if p.colocate else ''}), but this machine has {p.devices_available} {kind}; "
        f"ask for fewer{share}, or {more}"
    )


def share_ranks(config: Config, world_size: int, num_layers: int | None) -> Parallel:
    """The trainer's parallel sizes.

    Raises:
        ConfigError: tensor x pipeline x context (or expert) parallel size does not divide the ranks.
    """
    megatron = config.megatron
    tensor, pipeline, context, expert = (
        megatron.get(f"{name}_parallel_size") or 1
        for name in ("tensor_model", "pipeline_model", "context", "expert_model")
    )
    product = tensor * pipeline * context
    if world_size % product:
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} x "
            f"--context-parallel-size {context} = {product} does not divide the {world_size} trainer ranks "
            f"(--actor-num-nodes x --actor-num-gpus-per-node); use {_next_multiple(world_size, product)} ranks or "
            "smaller sizes"
        )
    expert_tensor = megatron.get("expert_tensor_parallel_size") or tensor
    if world_size % (expert * expert_tensor * pipeline):
        raise ConfigError(
            f"--expert-model-parallel-size {expert} x --expert-tensor-parallel-size {expert_tensor} x "
            f"--pipeline-model-parallel-size {pipeline} does not divide the {world_size} trainer ranks; "
            "use smaller sizes or more ranks"
        )
    return Parallel(
        tensor, pipeline, context, world_size // product, expert, _virtual_pipeline(config, pipeline, num_layers)
    )


_VIRTUAL_STAGES = (
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "virtual_pipeline_model_parallel_size",
)
"""Three flags that say in how many pieces (virtual stages) a pipeline rank holds its layers."""


def _virtual_pipeline(config: Config, pipeline: int, num_layers: int | None) -> int | None:
    """Virtual stages of each pipeline rank; None where stages are not interleaved."""
    megatron = config.megatron
    said = {f"--{dest.replace('_', '-')}": megatron[dest] for dest in _VIRTUAL_STAGES if megatron.get(dest) is not None}
    if not said:
        return None
    flag, number = next(iter(said.items()))
    if len(said) > 1:
        raise ConfigError(f"{' and '.join(said)} say the same thing in several ways; keep one of them")
    if number < 1:
        raise ConfigError(f"{flag} is {number}; it must be at least 1, e.g. {flag} 2")
    if pipeline == 1:
        raise ConfigError(
            f"{flag} {number} divides the layers of a pipeline stage, but there is no pipeline; drop it, or add "
            "--pipeline-model-parallel-size 2"
        )
    size = number
    if flag == "--num-layers-per-virtual-pipeline-stage":
        layers = (num_layers or 0) // pipeline
        if not layers or layers % number:
            raise ConfigError(
                f"{flag} {number} does not divide the {layers} layers of each of {pipeline} pipeline stages; "
                "it must be a divisor of that"
            )
        size = layers // number
    return size if size > 1 else None


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
