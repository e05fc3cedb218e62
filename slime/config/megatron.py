"""Megatron's values: what slime forces, and the map from `args` to the fields of Megatron-core's dataclasses."""

from argparse import Namespace
from typing import Any

from slime.config.config import Config
from slime.config.devices import Parallel, Placement

FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "persist_layer_norm",
    "moe_permute_fusion",
    "moe_grouped_gemm",
    "moe_router_fusion",
    "cross_entropy_loss_fusion",
)
"""Megatron's own fused kernels, which need Apex or Transformer Engine, or save what slime's kernels save already."""


def megatron_fields(args: Namespace) -> dict[str, Any]:
    """Field of Megatron-core's dataclasses -> value, for every field that the user set, that the model's config.json
    says or that slime decides; all others keep the dataclass's default.

    Values are plain: names for enumerations (attention_backend) and for number formats (`fp32`).

    Args:
        args: as `parse_args` returns it; `args.megatron_field_dests` names the attribute of each field.
    """
    fields = {field: getattr(args, dest) for field, dest in args.megatron_field_dests.items()}
    if args.swiglu:
        fields["gated_linear_unit"] = True
    if not args.group_query_attention:
        fields.pop("num_query_groups", None)
    if args.multi_latent_attention:
        fields["q_lora_rank"] = args.q_lora_rank
    return fields


def forced_values(
    config: Config, shape: dict[str, Any], placement: Placement, parallel: Parallel, dtype: str
) -> tuple[dict[str, Any], list[str]]:
    """Megatron's values (dest -> value) that do not come from the command line, and notes on what they overrule.

    Args:
        shape: values that config.json gives; those that were given on the command line are kept.
    """
    megatron, given = config.megatron, config.given
    values = {dest: value for dest, value in shape.items() if dest not in given}
    known = dict(megatron) | values
    sequence = megatron.get("seq_length") or 4096
    tensor = parallel.tensor
    values |= {
        "use_distributed_optimizer": True,
        "enable_gloo_process_groups": megatron.get("enable_gloo_process_groups", True),
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "use_persistent_ckpt_worker": True,
        "ckpt_assume_constant_structure": True,
        "ckpt_fully_parallel_load": True,
        "dist_ckpt_save_pre_mcore_014": True,
        "variable_seq_lengths": True,
        "seq_length": sequence,
        "max_position_embeddings": known.get("max_position_embeddings") or sequence,
        "rope_type": megatron.get("rope_type") or ("yarn" if megatron.get("multi_latent_attention") else "rope"),
        "tokenizer_type": megatron.get("tokenizer_type") or "HuggingFaceTokenizer",
        "tokenizer_model": megatron.get("tokenizer_model") or config.rollout.hf_checkpoint,
        "padded_vocab_size": _padded_vocabulary(config, known, tensor),
        "sequence_parallel": bool(megatron.get("sequence_parallel")) and tensor > 1,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline,
        "ckpt_step": megatron.get("ckpt_step"),
    }
    if megatron.get("moe_token_dispatcher_type") == "allgather":
        values["moe_token_dispatcher_type"] = "alltoall"
    if megatron.get("recompute_activations") and megatron.get("recompute_granularity") is None:
        values["recompute_granularity"] = "selective"
    if megatron.get("use_rope_scaling") and "rope_scaling_factor" not in given and "rotary_scaling_factor" in given:
        values["rope_scaling_factor"] = megatron["rotary_scaling_factor"]
    values |= {dest: 0.0 for dest in ("hidden_dropout", "attention_dropout") if dest not in given | set(shape)}
    notes: list[str] = []
    values |= _own_kernels(placement.device)
    notes += _notes_on_kernels(config, placement.device)
    if megatron.get("sequence_parallel") and tensor == 1:
        notes.append("--sequence-parallel has no effect with --tensor-model-parallel-size 1")
    return values, notes


def _own_kernels(device: str) -> dict[str, Any]:
    """Layers are Megatron's local ones, with slime's kernels in them on every device."""
    fusions = [name for name in FUSIONS if device == "cpu" or not name.startswith("moe_")]
    return dict.fromkeys(fusions, False) | {"transformer_impl": "local"}


def _notes_on_kernels(config: Config, device: str) -> list[str]:
    """What was asked for by name and is done otherwise."""
    asked = [name for name in FUSIONS if name in config.given and config.megatron.get(name)]
    flags = ["--" + name.replace("_", "-") for name in asked]
    if "transformer_impl" in config.given and config.megatron["transformer_impl"] != "local":
        flags.append(f"--transformer-impl {config.megatron['transformer_impl']}")
    if not flags:
        return []
    on_gpu = "layers are Megatron's local ones with slime's kernels, which the log names"
    return [f"{', '.join(flags)}: {'for GPUs only, off on the CPU' if device == 'cpu' else on_gpu}"]


def _padded_vocabulary(config: Config, known: dict[str, Any], tensor: int) -> int | None:
    if config.train.padded_vocab_size is not None or not known.get("vocab_size"):
        return config.train.padded_vocab_size
    multiple = (known.get("make_vocab_size_divisible_by") or 128) * tensor
    return int(-(-known["vocab_size"] // multiple) * multiple)
