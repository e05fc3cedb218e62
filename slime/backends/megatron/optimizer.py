"""The optimizer and its learning rate: built, stepped, checked for what is not finite."""

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from slime.backends.megatron.config import optimizer_config


class StepResult(NamedTuple):
    """What one optimizer step did.

    Attributes:
        is_applied: False if a gradient was not finite; the weights are then as before.
        grad_norm: norm of the whole model's gradient before clipping.
    """

    is_applied: bool
    grad_norm: float


def build_optimizer(args: Namespace, models: Sequence[torch.nn.Module]) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped stages; its main parameters are float32 copies where weights are not."""
    optimizer = get_megatron_optimizer(optimizer_config(args), list(models))
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW | torch.optim.Adam):
            _fuse(part.optimizer)
    return optimizer


def _fuse(adam: torch.optim.Optimizer) -> None:
    """One pass over memory a step instead of a dozen; the same formula. (Megatron has no setting for torch's Adam.)"""
    for group in [adam.defaults, *adam.param_groups]:
        group["fused"], group["foreach"] = True, False


def build_scheduler(args: Namespace, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Learning rate by the number of samples trained, as in Megatron: warm-up, then --lr-decay-style.

    --lr-warmup-fraction and --lr-warmup-iters, --lr-decay-iters count optimizer steps of --global-batch-size samples.
    A resumed run follows its command line, so that a new --lr or --num-rollout takes effect; with
    --use-checkpoint-opt_param-scheduler it follows the checkpoint.
    """
    follows_checkpoint = bool(getattr(args, "use_checkpoint_opt_param_scheduler", False))
    batch = args.global_batch_size
    decay_samples = max((getattr(args, "lr_decay_iters", None) or train_iters(args)) * batch, 1)
    if (fraction := getattr(args, "lr_warmup_fraction", None)) is not None:
        warmup_samples = int(fraction * decay_samples)
    else:
        warmup_samples = (getattr(args, "lr_warmup_iters", 0) or 0) * batch
    weight_decay = getattr(args, "weight_decay", 0.01)
    start_decay = getattr(args, "start_weight_decay", None)
    end_decay = getattr(args, "end_weight_decay", None)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=getattr(args, "lr_warmup_init", 0.0) or 0.0,
        max_lr=args.lr,
        min_lr=getattr(args, "min_lr", None) or 0.0,
        lr_warmup_steps=min(warmup_samples, decay_samples - 1),
        lr_decay_steps=decay_samples,
        lr_decay_style=getattr(args, "lr_decay_style", None) or "constant",
        start_wd=weight_decay if start_decay is None else start_decay,
        end_wd=weight_decay if end_decay is None else end_decay,
        wd_incr_steps=decay_samples,
        wd_incr_style=getattr(args, "weight_decay_incr_style", None) or "constant",
        use_checkpoint_opt_param_scheduler=follows_checkpoint,
        override_opt_param_scheduler=not follows_checkpoint,
    )


def train_iters(args: Namespace) -> int:
    """Optimizer steps of the whole run; 1 where the number of rollouts is not known."""
    num_rollout = getattr(args, "num_rollout", None) or 1
    samples = num_rollout * args.rollout_batch_size * args.n_samples_per_prompt
    return max(samples // args.global_batch_size, 1)


@torch.no_grad()
def step(optimizer: MegatronOptimizer) -> StepResult:
    """Reduce, clip and apply the gradients; all ranks take the same decision."""
    if optimizer.prepare_grads():  # fp16 only: the loss scale was too large and is lowered
        return StepResult(False, float("nan"))
    grad_norm = _grad_norm(optimizer)
    if not math.isfinite(grad_norm):
        return StepResult(False, grad_norm)
    for part in optimizer.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            _clip(part, grad_norm)
    optimizer.step_with_ready_grads()
    return StepResult(True, grad_norm)


def _grad_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of the whole model's gradient. (Without Transformer Engine and apex Megatron's own function asks a GPU for
    the norm of one parameter after the other, and waits for each.)"""
    device = torch.device(torch.cuda.current_device())
    if device.type == "cpu":
        return float(optimizer.get_grad_norm())
    groups: dict[Any, list[Tensor]] = {}
    for part in optimizer.chained_optimizers:
        groups.setdefault(part.get_grad_stats_parallel_group(), []).extend(part.get_main_grads_for_grad_norm())
    squares = []
    for group, grads in groups.items():
        square = torch.zeros((), device=device)
        if grads:
            square = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(square, group=group)
        squares.append(square)
    return math.sqrt(float(torch.stack(squares).sum()))


def _clip(part: MegatronOptimizer, grad_norm: float) -> None:
    """Scale gradients in place so that the whole model's norm is at most --clip-grad. (Megatron's own function copies
    every gradient where neither Transformer Engine nor apex is installed.)"""
    config = part.config
    factor = config.clip_grad / (grad_norm + 1e-6)
    if config.clip_grad <= 0.0 or factor >= 1.0:
        return
    name = "decoupled_grad" if config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    gradients = [getattr(parameter, name) for parameter in part.get_parameters()]
    gradients = [gradient for gradient in gradients if gradient is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def learning_rates(optimizer: MegatronOptimizer) -> list[float]:
    """Of each parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]
