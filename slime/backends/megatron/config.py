"""Flags and model shape to Megatron-core's configuration objects."""

from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig

from slime.models import ModelShape

_TRANSFORMER_FLAGS = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel",
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "distribute_saved_activations", "fp32_residual_connection", "deterministic_mode", "overlap_p2p_comm",
    "batch_p2p_comm", "microbatch_group_size_per_vp_stage", "calculate_per_token_loss",
)  # fmt: skip
"""Fields of TransformerConfig that say how to train, under the same name in `args`. The model's own fields come from
the checkpoint's config.json."""

_OPTIMIZER_FLAGS = (
    "optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", "clip_grad",
    "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
    "use_distributed_optimizer", "overlap_param_gather", "optimizer_cpu_offload", "optimizer_offload_fraction",
    "overlap_cpu_optimizer_d2h_h2d", "use_precision_aware_optimizer", "decoupled_lr", "decoupled_min_lr",
)  # fmt: skip
_DDP_FLAGS = ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "average_in_collective")


def params_dtype(args: Namespace) -> torch.dtype:
    """What weights and activations are computed in."""
    if getattr(args, "bf16", False):
        return torch.bfloat16
    return torch.float16 if getattr(args, "fp16", False) else torch.float32


def transformer_config(args: Namespace, shape: ModelShape) -> TransformerConfig:
    """The model's shape, and how this run trains it."""
    flags = _given(args, _TRANSFORMER_FLAGS)
    if getattr(args, "recompute_activations", False):
        flags.setdefault("recompute_granularity", "selective")
    dtype = params_dtype(args)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        add_qkv_bias=shape.has_qkv_bias,
        qk_layernorm=shape.has_qk_norm,
        add_bias_linear=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # the name is Megatron's; it makes the MLP build the spec's activation: our SwiGLU
        hidden_dropout=0.0,  # the engine samples without dropout, and log-probs must be comparable
        attention_dropout=0.0,
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        embedding_init_method=_leave_as_is,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for with variable lengths, for dense models too
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False,  # needs apex
        **flags,
    )


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that costs nothing: every weight is loaded. (Without one Megatron forgets to mark slices.)"""
    return weight


def ddp_config(args: Namespace) -> DistributedDataParallelConfig:
    """How gradients are accumulated and reduced. Non-finite ones are found after the reduction, by all ranks alike."""
    in_fp32 = params_dtype(args) is torch.bfloat16 or bool(getattr(args, "accumulate_allreduce_grads_in_fp32", False))
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=in_fp32,
        check_for_nan_in_grad=False,
        bucket_size=getattr(args, "ddp_bucket_size", None),
        **_given(args, _DDP_FLAGS),
    )


def optimizer_config(args: Namespace) -> OptimizerConfig:
    """The optimizer's settings; the learning rate is the scheduler's from then on."""
    flags = _given(args, _OPTIMIZER_FLAGS)
    dtype = params_dtype(args)
    return OptimizerConfig(
        **({"min_lr": 0.0} | flags),
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
    )


def _given(args: Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the names that args have, None counting as not given."""
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
