"""Flags of the contract whose work is not built yet: refused, so that no run silently does without them.

An entry goes when its work is done. A flag belongs here only while nothing reads it.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from slime.config.errors import Problems
from slime.config.flags import Flag

_Test = Callable[[Any], bool]


def _is_on(value: Any) -> bool:
    return bool(value)


def _not(default: Any) -> _Test:
    return lambda value: value != default


def _only(refused: Any) -> _Test:
    return lambda value: value == refused


_TWO_WORKERS = "the router wants two engines at its own start for it, and gets them afterwards; use cache_aware"

UNBUILT: dict[str, tuple[_Test, str]] = {
    "advantage_estimator": (_only("ppo"), "there is no critic; use grpo"),
    "context_parallel_size": (_not(1), "the trainer does not slice a sequence; use 1"),
    "expert_model_parallel_size": (_not(1), "mixtures of experts are not trained; use 1"),
    "expert_tensor_parallel_size": (_not(1), "mixtures of experts are not trained; leave it out"),
    "num_experts": (_is_on, "mixtures of experts are not trained; choose a dense model"),
    "multi_latent_attention": (_is_on, "models with latent attention are not trained; choose another model"),
    "use_routing_replay": (_is_on, "mixtures of experts are not trained"),
    "use_rollout_routing_replay": (_is_on, "mixtures of experts are not trained"),
    "multimodal_keys": (_is_on, "only text models are trained"),
    "num_data_workers": (_is_on, "the rollout manager prepares prompts; leave it at 0"),
    "streaming_data": (_is_on, "the prompt file is read whole; leave it out, or cut it with @[start:end]"),
    "ci_disable_kl_checker": (_is_on, "leave it out"),
    "ci_load_grad_norm": (_is_on, "leave it out"),
    "ci_save_grad_norm": (_is_on, "leave it out"),
    "ci_train_rollout_logprob_abs_diff_threshold": (_not(0.1), "watch train/train_rollout_logprob_abs_diff"),
    "load_forge_rollout_data": (_is_on, "use --load-debug-rollout-data"),
    "memory_recorder": (_not("torch"), "torch's own allocator is what is recorded; leave it out"),
    "use_opd": (_is_on, "on-policy distillation has no teacher yet; leave it out"),
    "opd_teacher_load": (_is_on, "on-policy distillation has no teacher yet; leave it out"),
    "opd_teacher_ckpt_step": (_not(None), "on-policy distillation has no teacher yet; leave it out"),
    "http_proxy": (_is_on, "slime's own traffic never goes through a proxy; leave it out"),
    "use_distributed_post": (_is_on, "one process sends the requests; leave it out"),
    "keep_old_actor": (_is_on, "leave it out"),
    "rollout_data_transport": (_not("object-store"), "use object-store"),
    "router_api_key": (_is_on, "router and engines share one key; use --sglang-api-key"),
    "router_control_plane_api_keys": (_is_on, "router and engines share one key; use --sglang-api-key"),
    "router_policy": (_only("power_of_two"), _TWO_WORKERS),
    "router_prefill_policy": (_only("power_of_two"), _TWO_WORKERS),
    "router_decode_policy": (_only("power_of_two"), _TWO_WORKERS),
    "model_name": (_is_on, "the family of a model is read from its config.json; leave it out"),
    "rollout_top_p": (
        _not(1.0), "training needs the kept tokens of each step, which stock engines do not return; leave it at 1"
    ),
    "padded_vocab_size": (_not(None), "the vocabulary is padded for tensor parallelism alone; leave it out"),
    "log_probs_max_tokens_per_gpu": (_not(None), "passes for log-probs take --max-tokens-per-gpu; leave it out"),
    "allgather_cp": (_is_on, "leave it out"),
    "custom_model_provider_path": (_is_on, "models are those of slime.models; leave it out"),
    "enable_mtp_training": (_is_on, "leave it out"),
    "freeze_indexer": (_is_on, "leave it out"),
    "megatron_config_path": (_is_on, "give the flags themselves"),
    "megatron_deepgemm_forward_layers": (_is_on, "leave it out"),
    "megatron_deepgemm_forward_modules": (_is_on, "leave it out"),
    "megatron_deepgemm_moe_forward_layers": (_is_on, "leave it out"),
    "megatron_deepgemm_moe_forward_modules": (_is_on, "leave it out"),
    "mtp_num_layers": (_is_on, "leave it out"),
    "mtp_loss_scaling_factor": (_not(0.2), "leave it out"),
    "qwen_gdn_backend": (_not("fla"), "models with gated-delta-net layers are not trained; leave it out"),
    "num_critic_only_steps": (_is_on, "there is no critic"),
    "recompute_loss_function": (_is_on, "the head already works in chunks; leave it out"),
    "release_train": (_is_on, "use --colocate, which gives memory back between phases"),
    "reset_optimizer_states": (_is_on, "leave it out"),
    "use_stateless_adam": (_is_on, "use --optimizer adam"),
    "custom_update_weight_post_write_path": (_is_on, "leave it out"),
    "update_weight_local_checkpoint_dir": (_is_on, "leave it out"),
    "update_weight_mode": (
        _not("full"), "stock SGLang loads whole tensors and has no call that applies a difference to them; use full"
    ),
    "update_weight_delta_encoding": (_not("xor"), "weights are sent whole; leave it out"),
    "update_weight_delta_checksum": (_not("xxh3-128"), "weights are sent whole; leave it out"),
}  # fmt: skip
"""Dest -> (whether a value asks for it, what to do instead)."""


def unbuilt_words(flag: Flag) -> str:
    """What the help of a flag adds where some of its values, or all but its default, are refused; else nothing."""
    if flag.dest not in UNBUILT:
        return ""
    is_refused = UNBUILT[flag.dest][0]
    values = [choice for choice in flag.choices or () if choice != flag.default]
    refused = [str(choice) for choice in values if is_refused(choice)]
    if len(refused) < len(values):
        return f" Not built yet: {', '.join(refused)}." if refused else ""
    has_default = not flag.is_switch and flag.default not in (None, [], {})
    return f" Not built yet: anything but {flag.default}." if has_default else " Not built yet."


def nothing_unbuilt_is_asked_for(args: Namespace) -> None:
    """Every flag that was given does something, and what was asked for together works together.

    Args:
        args: as `build_args` returns them; `args.plan.given` holds what was said.

    Raises:
        ConfigError: whatever is not built.
    """
    problems = Problems()
    given = args.plan.given
    for name, (asks_for_it, instead) in UNBUILT.items():
        if name in given and asks_for_it(given[name]):
            shown = "" if given[name] is True or name in _SECRET else f" {given[name]}"
            problems.add(f"--{name.replace('_', '-')}{shown} is not built yet: {instead}")
    problems.add(*_of_the_devices(args))
    problems.raise_if_any()


_SECRET = {"router_api_key", "router_control_plane_api_keys"}


def _of_the_engines(args: Namespace) -> Iterator[str]:
    """Settings with which an engine's weights are not the trainer's, so that no digest could prove them."""
    settings: list[tuple[str | None, Mapping[str, Any]]] = [
        (None, {name: getattr(args, f"sglang_{name}", None) for name in _OTHER_WEIGHTS})
    ]
    settings += [(g.model, g.overrides) for g in args.engine_groups if g.updates_weights]
    for of, values in settings:
        for name, (fits, why) in _OTHER_WEIGHTS.items():
            value = values.get(name)
            if value and not fits(value, args.plan.dtype.value):
                flag = f"--sglang-{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                spelt = flag if of is None else f"the override of {of}, {name}: {value},"
                yield (
                    f"{spelt} is not built yet where weights are synced: the digests that prove them {why}; "
                    "leave it out"
                )


_SGLANG_DTYPES = {
    "bf16": ("auto", "bfloat16"), "fp16": ("auto", "half", "float16"), "fp32": ("auto", "float", "float32"),
}  # fmt: skip
"""SGLang's names of the trainer's number format; `auto` is the one that slime passes on by itself."""
_LAYOUT, _FORMAT = "are foretold for tensor parallel engines alone", "are of the weights as they are trained"
_OTHER_WEIGHTS: dict[str, tuple[Callable[[Any, str], bool], str]] = {
    "pp_size": (lambda value, dtype: value == 1, _LAYOUT),
    "enable_dp_attention": (lambda value, dtype: False, _LAYOUT),
    "dtype": (lambda value, dtype: value in _SGLANG_DTYPES[dtype], _FORMAT),
    "quantization": (lambda value, dtype: False, _FORMAT),
    "torchao_config": (lambda value, dtype: False, _FORMAT),
    "modelopt_quant": (lambda value, dtype: False, _FORMAT),
}
"""Field of an engine that gets weights -> whether a value fits the trainer's number format, and why others do not."""


def _of_the_devices(args: Namespace) -> Iterator[str]:
    """What is not built on the devices that the plan chose."""
    plan = args.plan
    p = plan.placement
    if plan.engine.value == "embedded" and "sglang_admin_api_key" in plan.given:
        yield "--sglang-admin-api-key is not built yet for the embedded engine: it asks for one, --sglang-api-key"
    if plan.engine.value == "sglang" and p.num_engines and not args.debug_rollout_only:
        yield from _of_the_engines(args)
    if plan.device.value == "cuda":
        if p.colocate and p.rollout_num_gpus > p.world_size:
            yield (
                f"--colocate with --rollout-num-gpus {p.rollout_num_gpus} and {p.world_size} trainer ranks is not "
                f"built yet: an engine's GPUs each need the trainer rank that hands them weights; use {p.world_size}"
            )
        if plan.engine.value == "embedded" and p.num_engines:
            yield (
                f"--rollout-engine embedded ({plan.engine.reason}) is not built yet on GPUs: it computes on the CPU; "
                "install SGLang (pip install -e '.[gpu]') or set SLIME_SGLANG_PYTHON to an interpreter that has it, or "
                "train on the CPU too with --device cpu"
            )
        if args.distributed_backend != "nccl":
            yield f"--distributed-backend {args.distributed_backend} is not built yet on GPUs: use nccl"
