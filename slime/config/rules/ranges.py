"""Numbers that must lie in a range, and templates that must name what changes."""

from collections.abc import Callable
from typing import Any

from slime.config.config import Config
from slime.config.errors import ConfigError, Problems

# group.field -> smallest value
AT_LEAST: dict[str, float] = {
    "cluster.actor_num_nodes": 1,
    "cluster.actor_num_gpus_per_node": 1,
    "cluster.rollout_num_gpus": 0,
    "cluster.rollout_num_gpus_per_engine": 1,
    "cluster.num_gpus_per_node": 1,
    "cluster.cpu_devices": 1,
    "cluster.distributed_timeout_minutes": 1,
    "run.keep_last": 1,
    "batch.num_rollout": 0,
    "batch.num_epoch": 1,
    "batch.start_rollout_id": 0,
    "batch.rollout_batch_size": 1,
    "batch.n_samples_per_prompt": 1,
    "batch.global_batch_size": 1,
    "batch.num_steps_per_rollout": 1,
    "batch.micro_batch_size": 1,
    "batch.max_tokens_per_gpu": 1,
    "batch.log_probs_max_tokens_per_gpu": 1,
    "batch.data_pad_size_multiplier": 1,
    "data.num_data_workers": 0,
    "rollout.rollout_max_response_len": 1,
    "rollout.rollout_max_prompt_len": 1,
    "rollout.rollout_max_context_len": 2,
    "rollout.over_sampling_batch_size": 1,
    "rollout.max_turns": 1,
    "eval.eval_interval": 1,
    "eval.n_samples_per_eval_prompt": 1,
    "eval.eval_temperature": 0,
    "eval.eval_max_response_len": 1,
    "engine.sglang_server_concurrency": 1,
    "engine.sglang_router_request_timeout_secs": 1,
    "asynchronous.async_buffer_size": 1,
    "weight_sync.update_weights_interval": 1,
    "weight_sync.update_weight_buffer_size": 1,
    "checkpoint.save_interval": 1,
    "algorithm.ref_update_interval": 1,
    "algorithm.entropy_coef": 0,
    "train.lr": 0,
    "train.clip_grad": 0,
    "train.num_critic_only_steps": 0,
    "fault_tolerance.rollout_health_check_interval": 0.1,
    "fault_tolerance.rollout_health_check_timeout": 0.1,
    "fault_tolerance.rollout_health_check_first_wait": 0,
    "fault_tolerance.liveness_timeout": 0,
    "correction.opsm_delta": 0,
}

# group.field -> (condition in words, whether the value is in the range)
IN_RANGE: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "rollout.rollout_temperature": ("above 0", lambda v: v > 0, "1.0"),
    "rollout.rollout_top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1, "1.0"),
    "rollout.rollout_top_k": ("-1 (all tokens) or at least 1", lambda v: v == -1 or v >= 1, "-1"),
    "eval.eval_top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1, "1.0"),
    "algorithm.eps_clip": ("above 0", lambda v: v > 0, "0.2"),
    "algorithm.eps_clip_high": ("above 0", lambda v: v > 0, "0.28"),
    "algorithm.eps_clip_c": ("above 1", lambda v: v > 1, "3.0"),
    "algorithm.gamma": ("from 0 to 1", lambda v: 0 <= v <= 1, "1.0"),
    "algorithm.lambd": ("from 0 to 1", lambda v: 0 <= v <= 1, "1.0"),
    "debug.load_debug_rollout_data_subsample": ("above 0 and at most 1", lambda v: 0 < v <= 1, "0.5"),
}

# group.field -> what the template must contain, and an example
TEMPLATES: dict[str, tuple[str, str]] = {
    "checkpoint.save_hf": ("{rollout_id}", "exports/step-{rollout_id}"),
    "debug.save_debug_rollout_data": ("{rollout_id}", "dump/rollout-{rollout_id}.pt"),
    "debug.save_debug_train_data": ("{rollout_id}", "dump/train-{rollout_id}-{rank}.pt"),
}


def numbers_are_in_range(config: Config) -> None:
    """Every number of `AT_LEAST` and `IN_RANGE`."""
    problems = Problems()
    for path, smallest in AT_LEAST.items():
        value = _value(config, path)
        if value is not None and value < smallest:
            problems.add(f"{_flag(path)} is {value}; it must be at least {smallest:g}, e.g. {_flag(path)} {smallest:g}")
    for path, (words, is_in_range, example) in IN_RANGE.items():
        value = _value(config, path)
        if value is not None and not is_in_range(value):
            problems.add(f"{_flag(path)} is {value}; it must be {words}, e.g. {_flag(path)} {example}")
    problems.raise_if_any()


def templates_name_the_rollout(config: Config) -> None:
    """A path that is written more than once must hold the rollout's number, or each file would overwrite the last."""
    problems = Problems()
    for path, (part, example) in TEMPLATES.items():
        value = _value(config, path)
        if path == "checkpoint.save_hf" and config.checkpoint.save_interval is None:
            continue  # exported once, after the last rollout
        if value is not None and part not in value:
            problems.add(
                f"{_flag(path)} {value}: without {part} each rollout would overwrite the last; "
                f"type e.g. {_flag(path)} '{example}'"
            )
    problems.raise_if_any()


def lengths_fit_the_context(config: Config) -> None:
    """Prompt and response must fit --rollout-max-context-len."""
    rollout = config.rollout
    context = rollout.rollout_max_context_len
    if context is None:
        return
    if rollout.rollout_max_prompt_len is not None and rollout.rollout_max_prompt_len >= context:
        raise ConfigError(
            f"--rollout-max-prompt-len {rollout.rollout_max_prompt_len} leaves no room for a response in "
            f"--rollout-max-context-len {context}; at most {context - 1} fits"
        )
    if rollout.rollout_max_response_len is not None and rollout.rollout_max_response_len > context:
        raise ConfigError(
            f"--rollout-max-response-len {rollout.rollout_max_response_len} is longer than "
            f"--rollout-max-context-len {context}; lower the one or raise the other"
        )


def oversampling_covers_a_batch(config: Config) -> None:
    """Fewer prompts than a batch cannot fill it at once."""
    size, batch = config.rollout.over_sampling_batch_size, config.batch.rollout_batch_size
    if size is not None and batch is not None and size < batch:
        raise ConfigError(
            f"--over-sampling-batch-size {size} is less than --rollout-batch-size {batch}; it must be at least {batch}"
        )


def _value(config: Config, path: str) -> Any:
    group, name = path.split(".")
    return getattr(getattr(config, group), name)


def _flag(path: str) -> str:
    return "--" + path.split(".")[1].replace("_", "-")


RULES = (numbers_are_in_range, templates_name_the_rollout, lengths_fit_the_context, oversampling_covers_a_batch)
