"""The policy as a Megatron model that takes packed rows and gives log-probabilities of the response tokens.

Letters: T rows of a packed micro-batch, N response tokens, V rows of the vocabulary on this rank.
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from slime.backends.megatron import config as megatron_config
from slime.backends.megatron.head import HeadOptions, VocabShard
from slime.backends.megatron.kernels import Kernels, kernels_for
from slime.backends.megatron.layers import decoder_block_spec
from slime.backends.megatron.packed import packed_segments
from slime.data.packing import PackedBatch
from slime.models import ModelShape


@dataclass(frozen=True)
class HeadOutput:
    """What the last pipeline stage gives for one micro-batch.

    Attributes:
        log_probs: [N] float32, nats; [0] where logits were asked for.
        entropy: [N] float32, nats, if asked for.
        logits: [1, T, V] float32 if asked for: all of them, which only a custom loss needs.
    """

    log_probs: Tensor
    entropy: Tensor | None = None
    logits: Tensor | None = None


class LogProbHead(ColumnParallelLinear):
    """The output layer, whose product with the hidden states is never held whole in float32.

    `PolicyModel` makes Megatron's output layer one of these: its weight, name and hooks stay, the forward differs.
    """

    vocab_size: int
    kernels: Kernels

    def forward(
        self, hidden: Tensor, weight: Tensor | None, batch: PackedBatch, options: HeadOptions
    ) -> tuple[Tensor, Tensor | None]:
        """hidden: [T or T/TP, 1, h] -> log_probs [N], entropy [N] or None."""
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
            rows = hidden[:, 0].index_select(0, batch.head_index)
        else:
            rows = hidden[:, 0].index_select(0, batch.head_index)
            rows = tensor_parallel.copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        return self.kernels.log_probs(rows, weight, batch.targets, self.shard(weight), options)

    def logits(self, hidden: Tensor, weight: Tensor | None, temperature: float) -> Tensor:
        """[T or T/TP, 1, h] -> [1, T, V] float32, divided by the temperature; padding of the vocabulary cut off."""
        weight = self.weight if weight is None else weight
        logits, _ = super().forward(hidden, weight=weight)
        return logits[..., : self.shard(weight).size].transpose(0, 1).float() / temperature

    def shard(self, weight: Tensor) -> VocabShard:
        rank, size = self.tp_group.rank(), self.tp_group.size()
        start = rank * weight.size(0)
        live = max(0, min(weight.size(0), self.vocab_size - start))
        return VocabShard(start, live, self.tp_group if size > 1 else None)


class PolicyModel(GPTModel):
    """One pipeline stage of the model."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, vp_stage: int | None = None) -> None:
        is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        device = torch.device(torch.cuda.current_device())
        kernels = kernels_for(device, config.attention_backend.name)
        super().__init__(
            config,
            decoder_block_spec(config, kernels, vp_stage),
            vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=shape.max_position_embeddings,
            pre_process=is_first,
            post_process=is_last,
            parallel_output=True,
            share_embeddings_and_output_weights=shape.is_tied,
            position_embedding_type="none",  # VarlenAttention applies the rotary angles
            vp_stage=vp_stage,
        )
        self.shape, self.kernels = shape, kernels
        self._angle_dtype = torch.float32 if kernels.angles_in_float32 else config.params_dtype
        self.inverse_frequencies = shape.rotary.inverse_frequencies().to(device)
        if self.post_process:
            self.output_layer.__class__ = LogProbHead
            self.output_layer.vocab_size = shape.vocab_size
            self.output_layer.kernels = kernels

    def forward(self, batch: PackedBatch, options: HeadOptions, *, wants_logits: bool = False) -> Tensor | HeadOutput:
        """Run one micro-batch through this stage.

        Args:
            batch: on the device.
            options: how log-probabilities are taken.
            wants_logits: give all logits instead.

        Returns:
            Hidden states [T, 1, h] for the next stage ([T/TP, 1, h] with sequence parallelism), or the last stage's
            `HeadOutput`.
        """
        packed = packed_segments(batch, self.inverse_frequencies, self._angle_dtype)
        embedded = self.embedding(input_ids=batch.input_ids[None], position_ids=None) if self.pre_process else None
        hidden = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if wants_logits:
            logits = self.output_layer.logits(hidden, weight, options.temperature)
            return HeadOutput(logits.new_zeros(0), None, logits)
        return HeadOutput(*self.output_layer(hidden, weight, batch, options))


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The least size that tensor-parallel ranks can share; rows that are added take part in nothing."""
    return -(-vocab_size // tp_size) * tp_size


def build_models(args: Namespace, shape: ModelShape) -> list[DistributedDataParallel]:
    """This rank's stages (one, or one a virtual pipeline stage), with gradient buffers. Weights are not set yet."""
    config = megatron_config.transformer_config(args, shape)
    num_stages = config.virtual_pipeline_model_parallel_size
    models = [PolicyModel(config, shape, vp) for vp in (range(num_stages) if num_stages else [None])]
    for model in models:
        freeze_parameters(model, args)
        for parameter in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp = megatron_config.ddp_config(args)
    return [DistributedDataParallel(config, ddp, model, disable_bucketing=i > 0) for i, model in enumerate(models)]


def freeze_parameters(model: PolicyModel, args: Namespace) -> None:
    """Apply --only-train-params-name-list or --freeze-params-name-list: regexes searched in global names."""
    only_train = getattr(args, "only_train_params_name_list", None) or []
    frozen = getattr(args, "freeze_params_name_list", None) or []
    for name, parameter in global_parameters([model]):
        if only_train:
            parameter.requires_grad = any(re.search(pattern, name) for pattern in only_train)
        elif any(re.search(pattern, name) for pattern in frozen):
            parameter.requires_grad = False


def unwrap(model: torch.nn.Module) -> PolicyModel:
    """The model inside DDP."""
    while not isinstance(model, PolicyModel):
        model = model.module
    return model


def global_parameters(models: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank with layers counted over the whole model."""
    for wrapped in models:
        model = unwrap(wrapped)
        for name, parameter in model.named_parameters():
            if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                layer = model.decoder.layers[int(match[1])].layer_number - 1
                name = f"decoder.layers.{layer}.{match[2]}"
            yield name, parameter
