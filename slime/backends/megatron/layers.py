"""The decoder layer as Megatron builds it where Transformer Engine is not: its norm, its attention, its activation.

Letters: T rows of a packed micro-batch, H query heads, G key and value heads (groups), d dimensions of a head.
"""

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from slime.backends.megatron import cpu_attention
from slime.backends.megatron.kernels import Kernels
from slime.backends.megatron.packed import PackedSegments
from slime.backends.megatron.products import linear


class Norm(torch.nn.RMSNorm):
    """RMSNorm, marked so that Megatron sums its gradient over sequence-parallel ranks.

    (Megatron's own wrapper refuses sequence parallelism.)
    """

    kernels: Kernels

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=_device())
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class _CpuProduct:
    """Megatron's linear layers with their product through oneDNN, where no communication is woven into it."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs["allreduce_dgrad"] or kwargs["sequence_parallel"]:
            return super()._forward_impl(input, weight, *args, **kwargs)
        out = linear(input, weight)
        return out if kwargs["bias"] is None else out + kwargs["bias"]


class CpuColumnParallelLinear(_CpuProduct, ColumnParallelLinear):
    """Rows of the weight on each tensor-parallel rank."""


class CpuRowParallelLinear(_CpuProduct, RowParallelLinear):
    """Columns of the weight on each tensor-parallel rank."""


class SwiGLU(MegatronModule):
    """The MLP's activation: [..., 2 f] -> [..., f]. (MegatronModule: the MLP asks its parts for checkpoint keys.)"""

    kernels: Kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.swiglu(x)


class VarlenAttention(torch.nn.Module):
    """`core_attention` for packed rows: each segment attends causally to itself and wholly to its prefix.

    It applies the rotary angles, as only `PackedSegments` knows the positions; Megatron's model is built without.
    """

    kernels: Kernels

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError("Packed attention has no dropout; give --attention-dropout 0.")
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> Tensor:
        """query: [T, H, d]; key, value: [T, G, d]. Returns [T, H * d]."""
        assert isinstance(packed_seq_params, PackedSegments), "the model is called with packed rows only"
        packed, rotate = packed_seq_params, self.kernels.rotate
        if packed.cos is not None and packed.sin is not None:
            query, key = rotate(query, packed.cos, packed.sin), rotate(key, packed.cos, packed.sin)
        if self.kernels.attention is None:
            return cpu_attention.attend(query, key, value, packed.blocks, self.scale).flatten(1)
        if packed.taken_keys is not None:
            key, value = (self.kernels.take_rows(x, *packed.taken_keys) for x in (key, value))
        assert packed.sequences is not None
        return self.kernels.attention(query, key, value, packed.sequences, self.scale).flatten(1)


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())


def decoder_block_spec(
    config: TransformerConfig, kernels: Kernels, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Megatron's local spec of the layers of this pipeline stage, with our norm, attention and activation in it."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )
    replacements: dict[type, Any] = {
        WrappedTorchNorm: _with(kernels, Norm), DotProductAttention: _with(kernels, VarlenAttention)
    }  # fmt: skip
    if _device().type == "cpu":
        replacements |= _CPU_REPLACEMENTS
    return _replaced(spec, replacements, _with(kernels, SwiGLU))


def _with(kernels: Kernels, layer: type) -> type:
    """The layer for one choice of kernels. (Megatron builds layers from classes, and passes them what it knows.)"""
    return type(layer.__name__, (layer,), {"kernels": kernels, "__doc__": layer.__doc__})


_CPU_REPLACEMENTS: dict[type, Any] = {
    ColumnParallelLinear: CpuColumnParallelLinear,
    RowParallelLinear: CpuRowParallelLinear,
}


def _replaced(spec: Any, modules: dict[type, Any], activation: type) -> Any:
    """The same spec with modules replaced; the stock one, which Megatron may share between models, is not touched."""
    if isinstance(spec, type):
        return modules.get(spec, spec)
    if isinstance(spec, list):
        return [_replaced(item, modules, activation) for item in spec]
    if isinstance(spec, MLPSubmodules):
        layers = {name: modules.get(layer, layer) for name, layer in vars(spec).items()}
        return dataclasses.replace(spec, **(layers | {"activation_func": activation}))
    if isinstance(spec, ModuleSpec):
        return dataclasses.replace(
            spec,
            module=_replaced(spec.module, modules, activation),
            submodules=_replaced(spec.submodules, modules, activation),
        )
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return dataclasses.replace(
            spec,
            **{
                f.name: _replaced(getattr(spec, f.name), modules, activation)
                for f in dataclasses.fields(spec)
                if f.init
            },
        )
    return spec
