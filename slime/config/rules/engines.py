"""Rules of devices, engines and loops: what can run on this machine and next to each other."""

import json
import re
from urllib.parse import urlsplit

from slime.config.config import Config
from slime.config.devices import choose_device
from slime.config.errors import ConfigError


def device_exists(config: Config) -> None:
    """--device cuda needs a GPU."""
    if config.cluster.device == "cuda" and config.machine.num_gpus == 0 and not config.machine.joins_cluster:
        raise ConfigError(
            "--device cuda: no NVIDIA GPU was found on this machine (no /dev/nvidia0, no nvidia-smi) and no Ray "
            "cluster runs; type --device cpu, or set RAY_ADDRESS to a cluster that has GPUs"
        )


def sglang_is_installed(config: Config) -> None:
    """--rollout-engine sglang needs the package, unless the servers run elsewhere."""
    needs_it = config.engine.rollout_engine == "sglang" and not config.is_external and not config.skips_engines
    if needs_it and not config.machine.has_sglang and not config.machine.joins_cluster:
        raise ConfigError(
            "--rollout-engine sglang: the package sglang is not installed here; install it (pip install -e '.[gpu]'), "
            "set SLIME_SGLANG_PYTHON to an interpreter that has it, or type --rollout-engine embedded"
        )


def asynchronous_does_not_colocate(config: Config) -> None:
    """Phases that run at the same time cannot take turns on the same devices."""
    if config.loop == "async" and config.cluster.colocate:
        raise ConfigError(
            "--colocate lets generation and training take turns, but train_async.py runs them together; "
            "drop --colocate or use train.py"
        )


def engines_generate_while_training_runs(config: Config) -> None:
    """In the asynchronous loop there is no phase in which engines could do without their memory."""
    cluster = config.cluster
    flag = "--offload" if cluster.offload else "--offload-rollout"
    if config.loop == "async" and not cluster.colocate and (cluster.offload or cluster.offload_rollout):
        if config.is_fully_async or config.skips_engines:
            return  # another rule says so, or no engine is there
        raise ConfigError(
            f"{flag} takes the engines' memory while training runs, and train_async.py generates then; drop it, or use "
            "train.py"
        )


def groups_in_flight_keep_their_engines(config: Config) -> None:
    """Engines that give their memory back between rollouts can keep nothing in flight."""
    cluster = config.cluster
    gives_back = cluster.colocate or cluster.offload or cluster.offload_rollout
    if config.is_fully_async and gives_back and not config.skips_engines:
        raise ConfigError(
            "--rollout-function-path with the fully asynchronous rollout keeps groups in flight while training runs, "
            "but --colocate and --offload-rollout take the engines' memory then; drop them and give the engines "
            "devices of their own with --rollout-num-gpus"
        )


def overlap_is_not_deterministic(config: Config) -> None:
    """Which weights make which token depends on when they arrive, which is never the same in two runs."""
    flag = _deterministic_flag(config)
    if flag is None:
        return
    if config.loop == "async" or config.is_fully_async:
        raise ConfigError(
            f"{flag} cannot hold where generation runs while weights change: which version makes a token is a matter "
            f"of timing; drop {flag}, or use train.py with the default rollout"
        )
    if config.asynchronous.pause_generation_mode == "retract":
        raise ConfigError(
            f"--pause-generation-mode retract computes replies again as if they were prompts, which gives other bits "
            f"than {flag} promises; use abort"
        )


def what_is_waited_for_stays_in_flight(config: Config) -> None:
    """Only the fully asynchronous rollout has groups that it could wait for."""
    if config.asynchronous.stale_samples == "wait" and config.rollout.partial_rollout and not config.is_fully_async:
        raise ConfigError(
            "--stale-samples wait cannot bound the age of --partial-rollout's groups, which are not in flight between "
            "rollouts; use discard or mask"
        )


def trained_weights_generate(config: Config) -> None:
    """Without an engine only a router is started, for servers that somebody else registers there."""
    is_debugging = config.debug.debug_rollout_only or config.skips_engines
    if config.cluster.rollout_num_gpus == 0 and not config.is_external and not is_debugging:
        raise ConfigError(
            "--rollout-num-gpus 0 starts routers and no engine, so nothing would take the trainer's weights and "
            "generate; give engines devices, name servers elsewhere with --rollout-external-engine-addrs, or add "
            "--debug-rollout-only"
        )


def nodes_have_the_devices(config: Config) -> None:
    """As many trainer ranks are on a node as it has GPUs, at most."""
    ranks, devices = config.cluster.actor_num_gpus_per_node, config.cluster.num_gpus_per_node
    if choose_device(config).value == "cuda" and ranks > devices and not config.debug.debug_rollout_only:
        raise ConfigError(
            f"--actor-num-gpus-per-node {ranks} is more than the devices of a node, --num-gpus-per-node {devices}; "
            f"type --num-gpus-per-node {ranks} if a node has so many, else use more nodes (--actor-num-nodes)"
        )


def debug_modes_exclude_each_other(config: Config) -> None:
    """A run generates only or trains only."""
    if config.debug.debug_rollout_only and config.skips_engines:
        other = "--debug-train-only" if config.debug.debug_train_only else "--load-debug-rollout-data"
        raise ConfigError(f"--debug-rollout-only and {other} together leave nothing to do; drop one of them")


def dumps_do_not_overwrite_each_other(config: Config) -> None:
    """Samples and training data go to different files."""
    debug = config.debug
    path = debug.save_debug_rollout_data
    if path is not None and path == debug.save_debug_train_data:
        raise ConfigError(
            f"--save-debug-rollout-data and --save-debug-train-data both write to {path}; give two different paths"
        )


def pipeline_divides_the_engine(config: Config) -> None:
    """An engine's devices are tensor parallel size x pipeline parallel size."""
    size, pipeline = config.cluster.rollout_num_gpus_per_engine, config.sglang.get("sglang_pp_size") or 1
    if pipeline > 1 and size % pipeline:
        raise ConfigError(
            f"--sglang-pp-size {pipeline} does not divide --rollout-num-gpus-per-engine {size}; "
            f"use {max(d for d in range(1, pipeline + 1) if size % d == 0)}"
        )


def data_parallel_engines_have_attention(config: Config) -> None:
    """SGLang's data parallelism inside an engine is that of its attention."""
    size = config.sglang.get("sglang_dp_size") or 1
    if size > 1 and not config.sglang.get("sglang_enable_dp_attention"):
        raise ConfigError(f"--sglang-dp-size {size} needs --sglang-enable-dp-attention; add that flag")


def one_way_to_describe_engines(config: Config) -> None:
    """Engines are described by one of three flags."""
    ways = {
        "--prefill-num-servers": config.engine.prefill_num_servers is not None,
        "--sglang-config": config.engine.sglang_config is not None,
        "--rollout-external-engine-addrs": config.is_external,
    }
    used = [flag for flag, is_used in ways.items() if is_used]
    if len(used) > 1:
        raise ConfigError(f"{' and '.join(used)} each describe the engines; keep one of them")


def engines_elsewhere_share_no_devices(config: Config) -> None:
    """External engines have devices of their own."""
    if config.is_external and config.cluster.colocate:
        raise ConfigError(
            "--colocate lets training and generation take turns on the same devices, but the engines of "
            "--rollout-external-engine-addrs run where they were started; drop one of the two"
        )


def addresses_are_addresses(config: Config) -> None:
    """External engines are given as host:port."""
    for address in config.rollout.rollout_external_engine_addrs or []:
        try:
            parts = urlsplit(address if "://" in address else f"http://{address}")
            is_address = bool(parts.hostname and parts.port) and re.fullmatch(r"https?", parts.scheme) is not None
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigError(f"--rollout-external-engine-addrs {address}: is not host:port; type e.g. 127.0.0.1:30000")


def engines_elsewhere_are_named_once(config: Config) -> None:
    """Each server counts once in the group that carries the weights."""
    addresses = config.rollout.rollout_external_engine_addrs or []
    if twice := [address for address in dict.fromkeys(addresses) if addresses.count(address) > 1]:
        raise ConfigError(
            f"--rollout-external-engine-addrs names {', '.join(twice)} more than once; name each server once"
        )


def memory_is_given_back_or_kept(config: Config) -> None:
    """--offload means both sides."""
    cluster = config.cluster
    for flag, value in (
        ("--no-offload-train", cluster.offload_train),
        ("--no-offload-rollout", cluster.offload_rollout),
    ):
        if cluster.offload and value is False:
            other = "--offload-rollout" if flag == "--no-offload-train" else "--offload-train"
            raise ConfigError(f"--offload and {flag} contradict each other; type {other} {flag} for one side alone")


def environment_is_text(config: Config) -> None:
    """Environment variables hold text."""
    for name, value in config.train.train_env_vars.items():
        if not isinstance(value, str):
            text = json.dumps({name: str(value)})
            raise ConfigError(f"--train-env-vars gives {name} the value {value!r}, which is not text; type '{text}'")


def router_address_is_complete(config: Config) -> None:
    """A router is named by address and port."""
    ip, port = config.engine.sglang_router_ip, config.engine.sglang_router_port
    if ip is not None and port is None:
        raise ConfigError(f"--sglang-router-ip {ip}: its port is missing; add --sglang-router-port 30000")


def epochs_need_a_data_set(config: Config) -> None:
    """An epoch is a pass over the data set."""
    counts_epochs = config.batch.num_rollout is None and config.batch.num_epoch is not None
    if counts_epochs and not config.data.rollout_global_dataset:
        raise ConfigError(
            f"--num-epoch {config.batch.num_epoch}: with --disable-rollout-global-dataset there is no data set to "
            "pass over; type --num-rollout N"
        )


def flops_balance_needs_dynamic_batches(config: Config) -> None:
    """Forward passes can only be formed by their work when their size is free."""
    batch = config.batch
    if batch.balance_by_flops and not batch.use_dynamic_batch_size:
        raise ConfigError("--balance-by-flops forms the forward passes; add --use-dynamic-batch-size")
    if batch.use_dynamic_batch_size and batch.max_tokens_per_gpu is None:
        raise ConfigError(
            "--use-dynamic-batch-size fills forward passes up to a number of tokens; add --max-tokens-per-gpu 9216"
        )


def deterministic_samples_are_whole(config: Config) -> None:
    """Where an aborted sample stops is a matter of timing, so what continues it cannot be the same in every run."""
    if config.rollout.partial_rollout and (flag := _deterministic_flag(config)):
        raise ConfigError(
            f"--partial-rollout continues samples where an abort cut them, which is a matter of timing and so "
            f"never the same in two runs with {flag}; drop one of them"
        )


def _deterministic_flag(config: Config) -> str | None:
    """The flag that asks for the same bits in every run, if one does."""
    for flag, values in (
        ("--deterministic-mode", config.megatron),
        ("--sglang-enable-deterministic-inference", config.sglang),
    ):
        if values.get(flag.removeprefix("--").replace("-", "_")):
            return flag
    return None


RULES = (
    device_exists,
    sglang_is_installed,
    asynchronous_does_not_colocate,
    engines_generate_while_training_runs,
    groups_in_flight_keep_their_engines,
    overlap_is_not_deterministic,
    what_is_waited_for_stays_in_flight,
    trained_weights_generate,
    nodes_have_the_devices,
    debug_modes_exclude_each_other,
    dumps_do_not_overwrite_each_other,
    pipeline_divides_the_engine,
    data_parallel_engines_have_attention,
    one_way_to_describe_engines,
    engines_elsewhere_share_no_devices,
    addresses_are_addresses,
    engines_elsewhere_are_named_once,
    memory_is_given_back_or_kept,
    environment_is_text,
    router_address_is_complete,
    epochs_need_a_data_set,
    flops_balance_needs_dynamic_batches,
    deterministic_samples_are_whole,
)
