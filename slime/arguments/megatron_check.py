"""Which of Megatron's flags slime's trainer obeys; any other that is given is refused, so that none is ignored.

Megatron-core's dataclasses have some 300 fields. The trainer runs dense models on Megatron's local layers with its own
norm, attention and head, so that most of them reach nothing.
"""

import functools
from argparse import Namespace
from typing import Any

from slime.arguments.flag_tables import table
from slime.arguments.parser import slime_flags
from slime.config.errors import Problems
from slime.config.flags import Flag
from slime.config.megatron import FUSIONS
from slime.config.model_shape import COMPARED
from slime.config.unbuilt import UNBUILT

READ = frozenset({
    "bf16", "ckpt_step", "deterministic_mode", "end_weight_decay", "finetune", "fp16", "lr_decay_iters",
    "lr_warmup_fraction", "lr_warmup_init", "lr_warmup_iters", "min_lr", "no_load_optim", "no_load_rng",
    "pipeline_model_parallel_size", "start_weight_decay", "tensor_model_parallel_size",
    "use_checkpoint_opt_param_scheduler", "weight_decay", "weight_decay_incr_style",
})  # fmt: skip
"""Attributes of `args` that the trainer or the rollout reads."""

READ_AT_START = frozenset({
    "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank", "recompute_activations",
})  # fmt: skip
"""Those that slime.config turns into others."""

PASSED_ON = frozenset({
    "adam_beta1", "adam_beta2", "adam_eps", "check_for_nan_in_loss_and_grad", "ddp_bucket_size",
    "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "decoupled_weight_decay", "hysteresis",
    "initial_loss_scale", "loss_scale", "loss_scale_window", "microbatch_group_size_per_vp_stage", "min_loss_scale",
    "overlap_grad_reduce", "overlap_param_gather", "recompute_granularity", "recompute_method", "recompute_num_layers",
    "sequence_parallel", "virtual_pipeline_model_parallel_size",
})  # fmt: skip
"""Fields of Megatron-core's dataclasses that act where the trainer uses them."""

WITHOUT_EFFECT = frozenset({
    "auto_detect_ckpt_format", "log_interval", "log_throughput", "use_dist_ckpt", "use_flash_attn", "use_mcore_models",
    "attention_softmax_in_fp32",  # the softmax is in fp32 inside every kernel that is used
    "make_vocab_size_divisible_by",  # rows that pad the vocabulary take part in nothing
    "max_position_embeddings", "seq_length",  # rotary positions have no end; sequences are packed as they come
    "vocab_size",  # config.json has it
})  # fmt: skip
"""Whatever they say, the result is the same."""

AS_ALWAYS: dict[str, tuple[Any, ...]] = {
    "accumulate_allreduce_grads_in_fp32": (True,),
    "add_bias_linear": (False,),
    "add_position_embedding": (False,),
    "attention_backend": ("auto", "flash", "fused"),
    "attention_dropout": (0.0,),
    "deallocate_pipeline_outputs": (True,),
    "gated_linear_unit": (True,),
    "group_query_attention": (True,),
    "hidden_dropout": (0.0,),
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root"),
    "normalization": ("RMSNorm",),
    "optimizer": ("adam",),
    "overlap_p2p_comm": (True,),  # of interleaved stages, the only ones that it concerns
    "override_opt_param_scheduler": (True,),
    "position_embedding_type": ("rope",),
    "recompute_modules": (["core_attn"], ["mlp"], ["core_attn", "mlp"]),
    "rope_type": ("rope",),
    "swiglu": (True,),
    "tokenizer_type": ("HuggingFaceTokenizer",),
    "transformer_impl": ("transformer_engine", "local"),
    "use_distributed_optimizer": (True,),
    "use_rotary_position_embeddings": (True,),
    "variable_seq_lengths": (True,),
}
"""Dest -> the values that describe what the trainer does, or that it can do; of several, any."""

LATENT = frozenset({
    "beta_fast", "beta_slow", "cache_mla_latents", "kv_lora_rank", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "q_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
})  # fmt: skip
"""Those of latent attention."""

_OBEYED = READ | READ_AT_START | PASSED_ON | WITHOUT_EFFECT | COMPARED.keys()


def no_megatron_flag_is_ignored(args: Namespace) -> None:
    """Every flag of Megatron's that was given does what it says.

    Args:
        args: as `build_args` returns them; `args.plan.given` holds what was said.

    Raises:
        ConfigError: those that would do nothing, or something else.
    """
    problems = Problems()
    seen = set(_accepted() | UNBUILT.keys())
    for flag in table("megatron"):
        if flag.dest in seen or flag.dest not in args.plan.given:
            continue
        seen.add(flag.dest)
        value = args.plan.given[flag.dest]
        usual = AS_ALWAYS.get(flag.dest)
        if value not in (usual or (flag.default,)):
            problems.add(f"{_as_typed(flag, value)} is not built yet in slime's trainer: {_instead(flag, usual)}")
    problems.raise_if_any()


def built_words(flag: Flag) -> str:
    """What the help of a flag of Megatron's adds where the trainer takes no value, or some alone; else nothing."""
    if flag.dest in _accepted() | UNBUILT.keys():
        return ""
    usual = AS_ALWAYS.get(flag.dest)
    if flag.kind in ("switch_on", "switch_off"):
        return "" if (flag.kind == "switch_on") in (usual or (flag.default,)) else " Not built yet."
    if usual is None:
        return " Not built yet."
    if flag.kind == "on_or_off":
        return f" Built: {_as_typed(flag, usual[0])}."
    return f" Built: {', '.join(' '.join(value) if isinstance(value, list) else str(value) for value in usual)}."


@functools.cache
def _accepted() -> frozenset[str]:
    """Dests whose every value is accepted: slime's own, those that are obeyed, and those that the plan notes."""
    fusions = {dest for dest in FUSIONS if not dest.startswith("moe_")}
    noted = fusions | {"transformer_impl"}
    return frozenset({flag.dest for flag in slime_flags()} | _OBEYED | noted)


def _as_typed(flag: Flag, value: Any) -> str:
    """The flag with its value, as on a command line."""
    if value is True:
        return flag.names[0]
    if value is False:
        switches = [f.names[0] for f in table("megatron") if f.dest == flag.dest and f.kind == "switch_off"]
        return switches[0] if switches else "--no-" + flag.names[0].removeprefix("--")
    words = value if isinstance(value, list) else [value]
    return " ".join([flag.names[0], *map(str, words)])


def _instead(flag: Flag, usual: tuple[Any, ...] | None) -> str:
    if usual is not None:
        return f"it takes {' or '.join(_as_typed(flag, value) for value in usual)}; type that, or leave the flag out"
    if flag.dest.startswith("moe_"):
        return "mixtures of experts are not trained; leave it out"
    if flag.dest in LATENT:
        return "models with latent attention are not trained; leave it out"
    return "leave it out"
