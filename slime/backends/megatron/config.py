"""Flags and model shape to Megatron-core's configuration objects."""

import dataclasses
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from slime.config.megatron import megatron_fields
from slime.models import ModelShape


def params_dtype(args: Namespace) -> torch.dtype:
    """What weights and activations are computed in."""
    if getattr(args, "bf16", False):
        return torch.bfloat16
    return torch.float16 if getattr(args, "fp16", False) else torch.float32


def transformer_config(args: Namespace, shape: ModelShape) -> TransformerConfig:
    """The model's shape, and how this run trains it."""
    dtype = params_dtype(args)
    ours: dict[str, Any] = dict(
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
        bias_activation_fusion=False,
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
    )
    given = _given(args, TransformerConfig)
    if "attention_backend" in given:
        given["attention_backend"] = AttnBackend[given["attention_backend"]]
    if given.get("virtual_pipeline_model_parallel_size"):
        # Of two ranks each is both neighbours of the other, and batched messages of the two directions get mixed up.
        ours |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        # Megatron then frees an output before it has waited for its sending. A CUDA stream keeps the order; gloo would
        # send what has come into that memory since.
        ours["deallocate_pipeline_outputs"] = torch.device(torch.cuda.current_device()).type != "cpu"
    return TransformerConfig(**(given | ours))


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    """An initialisation that costs nothing: every weight is loaded. (Without one Megatron forgets to mark slices.)"""
    return weight


def ddp_config(args: Namespace) -> DistributedDataParallelConfig:
    """How gradients are accumulated and reduced. Non-finite ones are found after the reduction, by all ranks alike."""
    given = _given(args, DistributedDataParallelConfig) | {"check_for_nan_in_grad": False}
    if params_dtype(args) is torch.bfloat16:
        given["grad_reduce_in_fp32"] = True
    return DistributedDataParallelConfig(**given)


def optimizer_config(args: Namespace) -> OptimizerConfig:
    """The optimizer's settings; the learning rate is the scheduler's from then on."""
    dtype = params_dtype(args)
    given = {"min_lr": 0.0} | _given(args, OptimizerConfig)
    return OptimizerConfig(
        **(given | dict(params_dtype=dtype, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16))
    )


def refuses_non_finite_steps(args: Namespace) -> bool:
    """Whether a gradient that is not finite ends the run (Megatron's default) or only its step."""
    return bool(megatron_fields(args).get("check_for_nan_in_grad", True))


def _given(args: Namespace, config: type) -> dict[str, Any]:
    """What the command line says about fields of one of Megatron's dataclasses."""
    names = {field.name for field in dataclasses.fields(config) if field.init}
    return {name: value for name, value in megatron_fields(args).items() if name in names}
