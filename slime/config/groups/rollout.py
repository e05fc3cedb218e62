"""Flags of generation: sampling, hooks, engines, the asynchronous loop."""

from dataclasses import dataclass
from typing import Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class RolloutConfig:
    """Rollout."""

    hf_checkpoint: str | None = None
    """HuggingFace folder of the model: engines start from it; tokenizer and shape are read from it. Required."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    model_name: str | None = None
    """Family name for converting weights. Default: what the model's config.json says."""
    rollout_function_path: str = "slime.rollout.sglang_rollout.generate_rollout"
    """Function (args, rollout_id, data_source, evaluation=False) that makes one rollout."""
    rollout_temperature: float = 1.0
    """Sampling temperature, above 0."""
    rollout_top_p: float = 1.0
    """Nucleus of the sampling; other than 1, the trainer uses the same nucleus for its log-probs."""
    rollout_top_k: int = -1
    """Sample among this many likeliest tokens; -1: all."""
    rollout_max_context_len: int | None = None
    """Longest prompt and response together, in tokens."""
    rollout_max_prompt_len: int | None = None
    """Prompts longer than this many tokens are left out. Default: --rollout-max-context-len minus 1."""
    rollout_max_response_len: int | None = None
    """Longest response, in tokens. Default: what --rollout-max-context-len leaves, else 1024."""
    rollout_skip_special_tokens: bool = False
    """Leave special tokens out of the response text."""
    rollout_stop: list[str] | None = None
    """Strings that end a response."""
    rollout_stop_token_ids: list[int] | None = None
    """Token ids that end a response."""
    rollout_shuffle: bool = False
    """Shuffle the prompts in each epoch."""
    rollout_seed: int = 42
    """Seed of shuffling and sampling."""
    over_sampling_batch_size: int | None = None
    """Prompts that are started at once while filtering. Default: --rollout-batch-size."""
    dynamic_sampling_filter_path: str | None = None
    """Function (args, samples) that keeps or drops a finished group."""
    partial_rollout: bool = False
    """Keep unfinished responses and continue them in the next rollout."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Leave the part of such a response that older weights wrote out of the loss."""
    custom_generate_function_path: str | None = None
    """Generates one sample, async (args, sample, sampling_params[, evaluation]), or a list, async (args, samples[,
    evaluation]): a dotted path, file.py:function, or file.py."""
    max_turns: int | None = None
    """Turns of a conversation; a custom generate function reads it as `args.max_turns`."""
    rollout_sample_hook_path: list[str] = flag([], kind="append")
    """Function (args, sample), called on every sample before its reward; may be repeated."""
    custom_rollout_log_function_path: str | None = None
    """Function (rollout_id, args, samples, metrics, seconds); True replaces the default logging."""
    custom_eval_rollout_log_function_path: str | None = None
    """Function (rollout_id, args, data, metrics); True replaces the default logging."""
    buffer_filter_path: str | None = None
    """Function (args, rollout_id, buffer, num_samples) that takes groups out of the data buffer."""
    keep_old_actor: bool = False
    """Keep a copy of the weights that made the rollout on the trainer."""
    rollout_data_postprocess_path: str | None = None
    """Function (args, rollout_id, rollout_data), called on every trainer rank before training."""
    rollout_data_transport: Literal["object-store", "nixl"] = "object-store"
    """How samples travel to the trainer."""
    rollout_external_engine_addrs: list[str] | None = None
    """host:port of SGLang servers that already run; slime starts none of its own."""
    rollout_sample_filter_path: str | None = None
    """Function (args, groups) that marks samples to be left out of the loss."""
    rollout_all_samples_process_path: str | None = None
    """Function (args, all_groups, data_source), called after a rollout with everything that was generated."""
    rollout_buffer_url: str | None = None
    """Address of a rollout buffer service."""
    fetch_trajectory_retry_times: int = -1
    """How often to ask that service for trajectories again; -1: for ever."""
    min_batch_collection_ratio: float = 1
    """Share of a batch that must have arrived from it."""
    rollout_task_type: str = "math"
    """Task that the service is asked for."""


@dataclass(frozen=True)
class EngineConfig:
    """Engines and router."""

    rollout_engine: Literal["auto", "sglang", "embedded"] = "auto"
    """Which server generates. auto: SGLang where a GPU and SGLang are, else the embedded CPU engine."""
    sglang_router_ip: str | None = None
    """A router that already runs; slime starts none of its own for the first model."""
    sglang_router_port: int | None = None
    """Its port; without --sglang-router-ip the port of the router that slime starts. Default: a free one."""
    sglang_router_request_timeout_secs: int = 14400
    """Longest request through the router, in seconds."""
    sglang_server_concurrency: int = 512
    """Requests in flight for each engine, at most."""
    prefill_num_servers: int | None = None
    """Engines that only read prompts (prefill and decode on different engines)."""
    sglang_config: str | None = None
    """YAML that describes several groups of engines (docs/engines.md)."""


@dataclass(frozen=True)
class FaultToleranceConfig:
    """Fault tolerance."""

    use_fault_tolerance: bool = False
    """Start an engine or the router again when it dies or hangs, and go on; without it the run ends, naming it."""
    rollout_health_check_interval: float = 30.0
    """Seconds between two health checks of an engine or the router."""
    rollout_health_check_timeout: float = 30.0
    """Seconds after which a silent engine or router is killed and counts as dead."""
    rollout_health_check_first_wait: float = 0.0
    """Seconds before the first health check of an engine that has just become healthy."""
    liveness_timeout: float = 60.0
    """Seconds without a sign of life after which a process of slime itself counts as dead: a trainer rank, the rollout
    manager, an engine's owner, and for these the driver. 0: never."""


@dataclass(frozen=True)
class AsyncConfig:
    """Asynchronous loop."""

    async_buffer_size: int = 1
    """Rollouts kept ready ahead of training (train_async.py and the fully asynchronous rollout); samples are at most
    this plus --update-weights-interval rollouts old."""
    stale_samples: Literal["discard", "mask", "wait"] = "discard"
    """What becomes of a group that would be older: thrown away, its old tokens out of the loss, or waited for before it
    is (wait: fully asynchronous rollout only; elsewhere as discard). All are counted."""
    pause_generation_mode: Literal["abort", "retract", "in_place"] = "abort"
    """What new weights do to requests in flight: end them and send them again with what they have, queue them again in
    the engine, or freeze them, so that they go on with keys and values of the older weights."""
