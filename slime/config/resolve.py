"""From a configuration to a plan: the one place where values are derived, defaulted and edited. Pure."""

import dataclasses
from typing import Any

from slime.config.batches import Batch, batch_arithmetic, check_micro_batches, longest_response
from slime.config.config import Config
from slime.config.devices import (
    Choice,
    Parallel,
    Placement,
    choose_device,
    choose_dtype,
    choose_engine,
    place,
    share_ranks,
)
from slime.config.engine_groups import DEFAULT_MODEL
from slime.config.errors import Problems
from slime.config.groups import RolloutConfig
from slime.config.keys import guessed_keys
from slime.config.megatron import forced_values
from slime.config.memory import divide_memory
from slime.config.model_shape import architecture_of, compare_with_config, count_parameters, shape_of
from slime.config.paths import RunPaths, Start, run_paths, starting_point
from slime.config.plan import TRAINER, Plan, Process
from slime.config.rules import RULES

_SGLANG_ALIASES = {
    "sglang_dp_size": "sglang_data_parallel_size",
    "sglang_pp_size": "sglang_pipeline_parallel_size",
    "sglang_ep_size": "sglang_expert_parallel_size",
    "sglang_moe_dp_size": "sglang_moe_data_parallel_size",
    "sglang_tp_size": "sglang_tensor_parallel_size",
}


def resolve(config: Config) -> Plan:
    """Decide everything that can be decided before anything starts.

    Raises:
        ConfigError: the configuration cannot run; every independent reason is in it.
    """
    problems = Problems()
    problems.check_all(RULES, config)
    shape: dict[str, Any] | None = None
    device = choose_device(config)
    engine = choose_engine(config, device.value)
    dtype = choose_dtype(config, device.value)
    placement = batch = parallel = paths = start = None
    with problems.collected():
        shape = _model_shape(config)
    with problems.collected():
        placement = place(config, device, engine)
    if config.batch.rollout_batch_size is not None or not problems.messages:
        with problems.collected():
            batch = batch_arithmetic(config)
    with problems.collected():
        if placement is not None:
            parallel = share_ranks(config, placement.world_size, (shape or dict(config.megatron)).get("num_layers"))
    with problems.collected():
        if batch is not None and parallel is not None:
            check_micro_batches(config, batch, parallel.data)
    with problems.collected():
        paths, start = run_paths(config), starting_point(config)
    problems.raise_if_any()
    assert placement and batch and parallel and paths and start
    return _plan(config, device, engine, dtype, placement, parallel, batch, paths, start, shape or {})


def _model_shape(config: Config) -> dict[str, Any]:
    """Values of config.json, after comparing them with what was given; none where only engines run."""
    hf = config.files.hf_config
    if hf is None or config.debug.debug_rollout_only:
        return {}
    compare_with_config(config.megatron, config.given, hf)
    return shape_of(hf)


def _plan(
    config: Config,
    device: Choice,
    engine: Choice,
    dtype: Choice,
    placement: Placement,
    parallel: Parallel,
    batch: Batch,
    paths: RunPaths,
    start: Start,
    shape: dict[str, Any],
) -> Plan:
    megatron, notes = forced_values(config, shape, placement, parallel, dtype.value)
    placement, memory = divide_memory(config, placement, parallel, batch, dict(config.megatron) | megatron)
    interval = config.eval.eval_interval if config.eval_datasets else None
    return Plan(
        loop=config.loop,
        device=device,
        engine=engine,
        dtype=dtype,
        placement=placement,
        parallel=parallel,
        batch=batch,
        paths=paths,
        start=start,
        num_rollout=config.batch.num_rollout,
        num_epoch=config.batch.num_epoch,
        eval_tasks=tuple(d.name for d in config.eval_datasets),
        eval_interval=interval,
        model=_model_words(config, dict(config.megatron) | megatron),
        algorithm=_algorithm_words(config),
        memory=memory.words if memory is not None else None,
        processes=_processes(config, placement, engine.value),
        updates={
            **megatron,
            **_device_updates(config, placement, parallel, device.value, engine.value),
            **_batch_updates(config, batch),
            **_path_updates(config, paths, start),
            **_debug_updates(config),
            **_algorithm_updates(config, batch),
            **_eval_updates(config, interval),
            **_engine_updates(config, placement),
            **_async_updates(config),
        },
        notes=tuple(notes + _notes(config, placement, engine.value, batch)),
        given={
            dest: value
            for dest, value in {**config.megatron, **config.sglang, **config.router}.items()
            if dest in config.given
        },
    )


def _device_updates(config: Config, p: Placement, parallel: Parallel, device: str, engine: str) -> dict[str, Any]:
    on_cpu = device == "cpu"
    return {
        "device": device,
        "rollout_engine": engine,
        "cpu_devices": p.devices_available if on_cpu and p.devices_available else config.cluster.cpu_devices,
        "num_gpus_per_node": p.devices_needed if on_cpu else config.cluster.num_gpus_per_node,
        "actor_num_nodes": p.actor_num_nodes,
        "actor_num_gpus_per_node": p.actor_num_gpus_per_node,
        "critic_num_nodes": p.actor_num_nodes,
        "critic_num_gpus_per_node": p.actor_num_gpus_per_node,
        "rollout_num_gpus": p.rollout_num_gpus,
        "rollout_num_engines": p.num_engines,
        "rollout_external": config.is_external,
        "engine_groups": p.engine_groups,
        "colocate": p.colocate,
        "offload_train": p.offload_train,
        "offload_rollout": p.offload_rollout,
        "engine_memory_fraction": p.engine_memory_fraction,
        "disable_grad_buffers_cpu_backup": p.offload_train,
        "disable_param_buffers_cpu_backup": p.offload_train,
        "distributed_backend": "gloo" if on_cpu else config.cluster.distributed_backend,
        "train_threads": p.train_threads,
        "rollout_threads": p.rollout_threads,
        "rank": 0,
        "world_size": p.world_size,
        "data_parallel_size": parallel.data,
    }


def _batch_updates(config: Config, batch: Batch) -> dict[str, Any]:
    given = config.batch
    return {
        "rollout_batch_size": batch.rollout_batch_size,
        "n_samples_per_prompt": batch.n_samples_per_prompt,
        "global_batch_size": batch.global_batch_size,
        "num_steps_per_rollout": batch.num_steps_per_rollout,
        "over_sampling_batch_size": config.rollout.over_sampling_batch_size or batch.rollout_batch_size,
        "balance_data": given.balance_data or given.balance_by_flops,
        "log_probs_max_tokens_per_gpu": given.log_probs_max_tokens_per_gpu or given.max_tokens_per_gpu,
        **guessed_keys(config.data, config.given, config.files.first_row),
    }


def _path_updates(config: Config, paths: RunPaths, start: Start) -> dict[str, Any]:
    updates: dict[str, Any] = {
        "working_dir": config.machine.working_dir,
        "run_name": paths.run_name,
        "run_dir": paths.run_dir,
        "save": paths.save,
        "load": start.load,
        "load_is_megatron": start.load_is_megatron,
        "load_is_hf": start.load_is_hf,
        "ref_load": start.ref_load,
        "ckpt_step": start.ckpt_step,
        "start_rollout_id": start.start_rollout_id,
        "update_weight_start_version": 0,
    }
    if not start.load_is_megatron:
        updates |= {"no_load_optim": True, "no_load_rng": True, "finetune": True}
    if config.train.release_train and config.checkpoint.save_interval is None:
        updates["save_interval"] = 1
    return updates


def _debug_updates(config: Config) -> dict[str, Any]:
    debug = config.debug
    updates: dict[str, Any] = {"debug_train_only": config.skips_engines}
    if debug.dump_details is not None:
        updates["save_debug_rollout_data"] = f"{debug.dump_details}/rollout_data/{{rollout_id}}.pt"
        updates["save_debug_train_data"] = f"{debug.dump_details}/train_data/{{rollout_id}}.pt"
    return updates


def _algorithm_updates(config: Config, batch: Batch) -> dict[str, Any]:
    a, c = config.algorithm, config.correction
    return {
        "eps_clip_high": a.eps_clip if a.eps_clip_high is None else a.eps_clip_high,
        "grpo_std_normalization": a.grpo_std_normalization and batch.n_samples_per_prompt > 1,
        "use_routing_replay": c.use_routing_replay or c.use_rollout_routing_replay,
        "use_critic": a.advantage_estimator == "ppo",
    }


def _eval_updates(config: Config, interval: int | None) -> dict[str, Any]:
    e, rollout = config.eval, config.rollout
    context = rollout.rollout_max_context_len
    prompt = rollout.rollout_max_prompt_len
    length = longest_response(config)
    datasets = [
        dataclasses.replace(d, max_response_len=length) if d.max_response_len is None else d
        for d in config.eval_datasets
    ]
    return {
        "eval_datasets": datasets,
        "eval_prompt_data": [word for d in config.eval_datasets for word in (d.name, d.path)] or None,
        "eval_interval": interval,
        "eval_function_path": e.eval_function_path or _default_eval_function(config),
        "eval_reward_key": e.eval_reward_key or config.reward.reward_key,
        "eval_max_context_len": e.eval_max_context_len or context,
        "rollout_max_response_len": length,
        "rollout_max_prompt_len": prompt if prompt is not None or context is None else context - 1,
    }


def _default_eval_function(config: Config) -> str:
    return RolloutConfig.rollout_function_path if config.is_fully_async else config.rollout.rollout_function_path


def _async_updates(config: Config) -> dict[str, Any]:
    """How far generation runs ahead, and how old that lets a sample become."""
    is_ahead, size = config.loop == "async", config.asynchronous.async_buffer_size
    limit = size + config.weight_sync.update_weights_interval
    return {
        "rollouts_ahead": size if is_ahead and not config.is_fully_async else 0,
        "max_staleness": limit if is_ahead or config.is_fully_async else None,
    }


def _engine_updates(config: Config, placement: Placement) -> dict[str, Any]:
    """Both spellings of SGLang's parallel sizes; none where no engine is started."""
    if config.skips_engines:
        return {}
    values: dict[str, Any] = {short: config.sglang.get(short) or 1 for short in _SGLANG_ALIASES}
    values["sglang_tp_size"] = placement.rollout_num_gpus_per_engine // values["sglang_pp_size"]
    ip = config.engine.sglang_router_ip
    wrapped = f"[{ip}]" if ip and ":" in ip and not ip.startswith("[") else ip
    return values | {long: values[short] for short, long in _SGLANG_ALIASES.items()} | {"sglang_router_ip": wrapped}


def _processes(config: Config, p: Placement, engine: str) -> tuple[Process, ...]:
    processes = [Process("driver", 1, 0, 0), Process("rollout manager", 1, 0, 0)]
    if not config.skips_engines and not config.is_external:
        processes.append(Process("router", max(1, len({group.model for group in p.engine_groups})), 0, 0))
        for group in p.engine_groups:
            kind = engine if group.worker_type == "regular" else f"{engine}, {group.worker_type}"
            of = "" if group.model == DEFAULT_MODEL else f" of {group.model}"
            processes.append(
                Process(f"engines ({kind}){of}", group.num_engines, group.num_gpus_per_engine, p.rollout_threads)
            )
    if not config.debug.debug_rollout_only:
        processes.append(Process(TRAINER, p.world_size, 1, p.train_threads))
        if config.algorithm.advantage_estimator == "ppo":
            processes.append(Process("critic ranks", p.world_size, 0, p.train_threads))
    return tuple(processes)


def _model_words(config: Config, values: dict[str, Any]) -> str:
    hf = config.files.hf_config
    name = config.rollout.hf_checkpoint or ""
    if hf is None or config.debug.debug_rollout_only:
        return name
    words = f"{name} ({architecture_of(hf)}, {values['num_layers']} layers"
    return f"{words}, {count_parameters(values) / 1e6:,.1f} M parameters)"


def _algorithm_words(config: Config) -> str:
    a = config.algorithm
    if a.loss_type == "sft_loss":
        return "supervised fine-tuning"
    parts: list[str] = [a.advantage_estimator]
    if a.use_kl_loss:
        parts.append(f"KL loss {a.kl_loss_type} x {a.kl_loss_coef:g}")
    if a.kl_coef:
        parts.append(f"KL in the reward x {a.kl_coef:g}")
    if a.loss_type == "custom_loss":
        parts.append(f"loss {a.custom_loss_function_path}")
    return ", ".join([*parts, f"lr {config.train.lr:g}"])


def _notes(config: Config, p: Placement, engine: str, batch: Batch) -> list[str]:
    """What was decided or left out that the user may not expect."""
    a = config.algorithm
    notes = []
    if p.device == "cpu" and "actor_num_gpus_per_node" not in config.given and not config.debug.debug_rollout_only:
        notes.append("--actor-num-gpus-per-node: 1 on the CPU where it is not given")
    if engine == "embedded" and 0 < p.num_engines < p.cores and config.loop == "sync":
        notes.append(
            f"{p.num_engines} engine(s) with 1 thread leave {p.cores - p.num_engines} core(s) idle while generating; "
            f"--rollout-num-gpus {p.cores} uses all"
        )
    sync = config.weight_sync
    files = ("update_weight_disk_dir", "update_weight_disk_keep_files")
    notes += [
        f"--{dest.replace('_', '-')} has no effect without --update-weight-transport disk"
        for dest in files
        if dest in config.given and sync.update_weight_transport != "disk"
    ]
    interval = sync.update_weights_interval
    if p.offload_rollout and interval > 1:
        notes.append(
            f"--update-weights-interval {interval}: weights go out every rollout: engines that gave their memory back "
            "need them"
        )
    shares_memory = p.colocate and p.device == "cuda" and config.weight_sync.update_weight_transport != "disk"
    if config.machine.expandable_segments and shares_memory:
        notes.append(
            "expandable_segments in PYTORCH_ALLOC_CONF or PYTORCH_CUDA_ALLOC_CONF: engines open such memory of the "
            "trainer only where processes may take each other's files (in a container: --cap-add SYS_PTRACE); if the "
            "first weight sync ends an engine, unset it or take --update-weight-transport disk"
        )
    if config.asynchronous.async_buffer_size > 1 and config.loop == "sync" and not config.is_fully_async:
        notes.append(
            f"--async-buffer-size {config.asynchronous.async_buffer_size} has no effect in train.py: use train_async.py"
        )
    lengths = (config.rollout.rollout_max_response_len, config.rollout.rollout_max_context_len)
    if lengths == (None, None) and p.num_engines:
        notes.append(f"--rollout-max-response-len: {longest_response(config)} tokens where it is not given")
    if config.eval.eval_interval and not config.eval_datasets:
        notes.append("--eval-interval without --eval-prompt-data or --eval-config: there is no evaluation")
    if a.kl_loss_coef and not a.use_kl_loss:
        notes.append(f"--kl-loss-coef {a.kl_loss_coef:g} has no effect without --use-kl-loss")
    if a.advantage_estimator == "cispo" and a.eps_clip < 1.0 and "eps_clip" in config.given:
        notes.append(f"--advantage-estimator cispo with --eps-clip {a.eps_clip:g} also clips from below; 1.0 does not")
    is_grouped = a.advantage_estimator in ("grpo", "gspo", "cispo", "reinforce_plus_plus_baseline")
    if batch.n_samples_per_prompt == 1 and is_grouped and a.rewards_normalization and a.loss_type == "policy_loss":
        notes.append(
            f"--n-samples-per-prompt 1: {a.advantage_estimator} subtracts the mean of a group, so rewards are compared "
            "across prompts only"
        )
    return notes
