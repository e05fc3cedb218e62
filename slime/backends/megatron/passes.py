"""The two ways through the model: forward for log-probabilities, and forward and backward for one optimizer step.

Letters: N response tokens of a micro-batch, R_i of its sample i.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from slime.algorithm.loss import LossFunction
from slime.algorithm.metrics import micro_batch_record, reduce_train_step_metrics
from slime.backends.megatron import parallel
from slime.backends.megatron.head import HeadOptions, default_keep_bytes
from slime.backends.megatron.microbatches import MicroBatch, Packer, TrainStep, in_sample_order
from slime.backends.megatron.model import HeadOutput
from slime.data.packing import split_by_sample
from slime.losses.aggregation import count_trained_tokens, scale_for_megatron, sum_of_sample_mean


def head_options(args: Namespace, *, is_training: bool) -> HeadOptions:
    """How this run takes log-probabilities."""
    coefficient = getattr(args, "entropy_coef", 0.0)
    return HeadOptions(
        temperature=getattr(args, "rollout_temperature", 1.0),
        with_entropy=is_training or getattr(args, "use_rollout_entropy", False),
        entropy_has_grad=is_training and coefficient != 0,
        chunk_rows=getattr(args, "log_probs_chunk_size", -1),
        keep_bytes=default_keep_bytes(torch.device(torch.cuda.current_device())) if is_training else 0,
    )


def compute_log_probs(
    args: Namespace, models: Sequence[torch.nn.Module], packer: Packer, data: dict[str, Any], steps: Sequence[TrainStep]
) -> dict[str, list[Tensor]] | None:
    """Log-probabilities of all response tokens of this rank under the weights that the model has now.

    Returns:
        `log_probs` and, if --use-rollout-entropy, `entropy`: per sample [R_i] float32 on the device, in the order of
        the rollout (None for samples that the schedule dropped). None on other than the last pipeline stage.
    """
    options = head_options(args, is_training=False)
    micro_batches = [indices for step in steps for indices in step.micro_batches]

    def collect(lengths: Sequence[int], output: HeadOutput, non_loss_data: bool = True) -> list[tuple[Tensor, ...]]:
        parts = [split_by_sample(output.log_probs, lengths)]
        if output.entropy is not None:
            parts.append(split_by_sample(output.entropy, lengths))
        return list(zip(*parts, strict=True))

    def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        batch = next(batches)
        return model(batch.packed, options), partial(collect, batch.packed.response_lengths)

    for model in models:
        model.eval()
    with torch.no_grad():
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=_iterators(packer, data, micro_batches, len(models)),
            model=list(models),
            num_microbatches=len(micro_batches),
            seq_length=1,  # with variable lengths, stages tell each other the shape
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not parallel.is_last_stage():
        return None
    ordered = in_sample_order(collected, micro_batches, len(data["tokens"]))
    names = ("log_probs", "entropy") if options.with_entropy else ("log_probs",)
    return {name: [None if each is None else each[i] for each in ordered] for i, name in enumerate(names)}


def forward_backward(
    args: Namespace,
    models: Sequence[torch.nn.Module],
    packer: Packer,
    data: dict[str, Any],
    step: TrainStep,
    loss_function: LossFunction,
) -> list[dict[str, Any]]:
    """Add the gradient of one step to the buffers. A GPU may still be at work on it.

    Returns:
        What `step_metrics` makes the step's metrics of.
    """
    options = head_options(args, is_training=True)
    wants_logits = args.loss_type == "custom_loss"

    def forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        batch = next(batches)
        output = model(batch.packed, options, wants_logits=wants_logits)
        return output, partial(_scaled_loss, args, step, batch, loss_function)

    for model in models:
        model.train()
    records: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=_iterators(packer, data, step.micro_batches, len(models)),
        model=list(models),
        num_microbatches=len(step.micro_batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    return records


def step_metrics(args: Namespace, records: Sequence[dict[str, Any]], step: TrainStep) -> dict[str, float]:
    """Every metric of the loss function, as a mean over the rollouts (or trained tokens) of the step.

    Collective, and the same on all ranks; the last pipeline stage has the records. It waits for the device: to be
    called when the device has been given more to do.
    """
    metrics: dict[str, float] = {}
    if parallel.is_last_stage():
        metrics = reduce_train_step_metrics(
            records,
            calculate_per_token_loss=bool(getattr(args, "calculate_per_token_loss", False)),
            step_global_batch_size=step.global_batch_size,
            cp_size=parallel_state.get_context_parallel_world_size(),
            dp_with_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
    return parallel.from_last_stage(metrics)


def _iterators(packer: Packer, data: dict[str, Any], micro_batches: list[list[int]], num_stages: int) -> Any:
    """One iterator a virtual stage, as Megatron's schedules want them."""
    iterators = [packer.batches(data, micro_batches) for _ in range(num_stages)]
    return iterators if num_stages > 1 else iterators[0]


def _scaled_loss(
    args: Namespace, step: TrainStep, batch: MicroBatch, loss_function: LossFunction, output: HeadOutput
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What Megatron's schedule asks for: loss to back-propagate, its divisor, and what to report."""
    per_token = bool(getattr(args, "calculate_per_token_loss", False))
    masks = batch.data["loss_masks"]
    reducer = sum_of_sample_mean(masks, batch.data["rollout_mask_sums"], calculate_per_token_loss=per_token)
    if output.logits is not None:
        loss, metrics = loss_function(args, batch.data, output.logits, reducer)
        if not loss.requires_grad:  # every stage and rank goes backward, whatever a custom loss left out
            loss = loss + 0 * output.logits.sum()
    else:
        loss, metrics = loss_function(args, batch.data, output.log_probs, output.entropy, reducer)
    num_tokens = count_trained_tokens(masks)
    scaled = scale_for_megatron(
        loss,
        calculate_per_token_loss=per_token,
        num_microbatches=len(step.micro_batches),
        step_global_batch_size=step.global_batch_size,
        dp_with_cp_size=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        cp_size=parallel_state.get_context_parallel_world_size(),
        num_tokens=num_tokens,
    )
    return scaled.loss, scaled.normalizer, micro_batch_record(metrics, num_tokens if per_token else 0)
