"""`MegatronTrainer`: one rank of a training job, with the verbs of `slime.backends.base.Trainer`."""

import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slime.algorithm import compute_advantages_and_returns, get_loss_function
from slime.backends.megatron.accelerator import accelerator_for
from slime.models.families import family_of
from slime.models.hf_folder import save_hf_folder
from slime.models.shape import read_config
from slime.utils.misc import load_function

logger = logging.getLogger(__name__)

_SAVE_BUCKET_BYTES = 1 << 30


class MegatronTrainer:
    """Trains with Megatron-core on this rank's device. Every method is collective: all ranks call it in one order."""

    def __init__(
        self, args: Namespace, rank: int, world_size: int, master_addr: str, master_port: int, role: str = "actor"
    ) -> None:
        """Keeps what it is told; `init` does the work.

        Args:
            args: the flat, resolved arguments of the run.
            rank, world_size: of this training job.
            master_addr, master_port: where rank 0 listens.
            role: `actor`. (A critic is another model with another loss.)
        """
        if role != "actor":
            raise NotImplementedError(f"The Megatron trainer trains an actor; a {role!r} is not built yet.")
        self.args, self.rank, self.world_size = args, rank, world_size
        self._address = (master_addr, master_port)
        local_rank = rank % max(getattr(args, "actor_num_gpus_per_node", world_size) or world_size, 1)
        self.accelerator = accelerator_for(getattr(args, "device", "cpu"), local_rank)
        self._seconds: dict[str, float] = {}
        self._num_steps = 0

    # --- life ------------------------------------------------------------------------------------------------------

    def init(self) -> int:
        """Join the other ranks, build and load the model; returns the first rollout id to run.

        Raises:
            ValueError: a model that is not supported, or a checkpoint that is not its weights.
        """
        args = self.args
        if self.accelerator.device.type == "cpu" and getattr(args, "train_threads", None):
            torch.set_num_threads(args.train_threads)
        self.accelerator.install()
        # imported only now: the accelerator prepares torch for megatron
        from slime.backends.megatron import model, optimizer, parallel, weights
        from slime.backends.megatron.memory import TrainingMemory
        from slime.backends.megatron.microbatches import Packer

        parallel.initialize(args, self.accelerator, self.rank, self.world_size, *self._address)
        if path := getattr(args, "custom_megatron_init_path", None):
            load_function(path)(args)
        config = read_config(args.hf_checkpoint)
        self._family = family_of(config)
        self._shape = self._family.shape_of(config)
        self.models = model.build_models(args, self._shape)
        self.optimizer = optimizer.build_optimizer(args, self.models)
        self.scheduler = optimizer.build_scheduler(args, self.optimizer)
        config = model.unwrap(self.models[0]).config
        _connect(config, self.models, self.optimizer)
        start = self._load()
        self._packer = Packer(args, self.parallel_config(), self.accelerator.device)
        self._loss_function = get_loss_function(args)
        self._memory = TrainingMemory(self.models, self.optimizer, self.accelerator)
        self._weights = weights.MegatronWeights(self.models, self._family, self._shape)
        return start

    def _load(self) -> int:
        """Reference weights first (they are kept apart), then the policy's; returns the first rollout id."""
        from slime.backends.megatron import checkpoint
        from slime.backends.megatron.reference import HostWeights

        args = self.args
        load = getattr(args, "load", None)
        iteration = checkpoint.latest_iteration(load)
        is_hf = load is not None and iteration is None and (Path(load) / "config.json").is_file()
        initial = load if is_hf else args.hf_checkpoint
        self._reference: HostWeights | None = None
        if wants_reference(args):
            reference = getattr(args, "ref_load", None) or initial
            self._load_weights(reference)
            self._reference = HostWeights(self.models)
            if iteration is None and Path(reference).resolve() == Path(initial).resolve():
                self.optimizer.reload_model_params()
                return getattr(args, "start_rollout_id", None) or 0
        if iteration is None:
            self._load_weights(initial)
            self.optimizer.reload_model_params()
            return getattr(args, "start_rollout_id", None) or 0
        is_new_run = bool(getattr(args, "finetune", False))
        with_optimizer = not is_new_run and not getattr(args, "no_load_optim", False)
        checkpoint.load(
            load,
            iteration,
            self.models,
            self.optimizer if with_optimizer else None,
            self.scheduler if with_optimizer else None,
            with_random_state=with_optimizer and not getattr(args, "no_load_rng", False),
        )
        if not with_optimizer:
            self.optimizer.reload_model_params()
        start = getattr(args, "start_rollout_id", None)
        if start is not None:
            return int(start)
        return 0 if is_new_run else iteration + 1

    def _load_weights(self, path: str) -> None:
        """From a HuggingFace folder or the newest iteration of a Megatron one."""
        from slime.backends.megatron import checkpoint, weights

        iteration = checkpoint.latest_iteration(path)
        if iteration is None:
            weights.load_hf_weights(self.models, path)
        else:
            checkpoint.load(path, iteration, self.models, None, None)

    def close(self) -> None:
        """Leave the process groups."""
        from slime.backends.megatron import parallel

        parallel.close()

    def parallel_config(self) -> dict[str, int]:
        """What the division of a rollout must know of this job's layout."""
        args = self.args
        model_parallel = (
            getattr(args, "tensor_model_parallel_size", 1)
            * getattr(args, "pipeline_model_parallel_size", 1)
            * getattr(args, "context_parallel_size", 1)
        )
        pipeline = getattr(args, "pipeline_model_parallel_size", 1)
        return {
            "dp_size": self.world_size // model_parallel,
            "cp_size": getattr(args, "context_parallel_size", 1),
            "vpp_size": getattr(args, "virtual_pipeline_model_parallel_size", None) or 1,
            "microbatch_group_size_per_vp_stage": getattr(args, "microbatch_group_size_per_vp_stage", None) or pipeline,
        }

    @property
    def data_parallel_rank(self) -> int:
        """Which shard of a rollout is this rank's."""
        from slime.backends.megatron import parallel

        return parallel.data_parallel_rank()

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, rollout_id: int, shard: dict[str, Any]) -> dict[str, float]:
        """Train on this rank's part of a rollout.

        Args:
            rollout_id: counts rollouts from 0.
            shard: what `slime.data.batch.split_train_data_by_dp` made for this data-parallel rank.

        Returns:
            `train/*`, `rollout/*` and `perf/*` metrics, the same on every rank.

        Raises:
            FloatingPointError: a loss or gradient that is not finite, before it reaches the weights.
        """
        from slime.backends.megatron import microbatches
        from slime.backends.megatron.rollout_metrics import rollout_metrics

        args = self.args
        self._seconds = {}
        data = microbatches.local_rollout(shard)
        steps = microbatches.train_steps(data)
        with self._timed("data_preprocess"):
            self._move_to_device(data)
        if getattr(args, "compute_advantages_and_returns", True):
            self._add_log_probs(data, steps)
            compute_advantages_and_returns(args, data)
        if path := getattr(args, "rollout_data_postprocess_path", None):
            load_function(path)(args, rollout_id, data)
        metrics = rollout_metrics(data, sum(step.global_batch_size for step in steps))
        with self._timed("actor_train"):
            metrics |= self._train_steps(rollout_id, data, steps)
        if self._reference is not None and (interval := getattr(args, "ref_update_interval", None)):
            if (rollout_id + 1) % interval == 0:
                with self._timed("ref_model_update"):
                    self._reference.update()
        return metrics | self._perf_metrics(data)

    def _move_to_device(self, data: dict[str, Any]) -> None:
        for key, values in data.items():
            if isinstance(values, list) and values and isinstance(values[0], Tensor) and key != "tokens":
                data[key] = [None if value is None else value.to(self.accelerator.device) for value in values]

    def _add_log_probs(self, data: dict[str, Any], steps: list[Any]) -> None:
        """`ref_log_probs` where a KL term needs them, `log_probs` where the loss cannot take its own."""
        if self._reference is not None:
            with self._timed("ref_log_probs"), self._reference.swapped_in():
                self._log_prob_pass(data, steps, prefix="ref_")
        if needs_old_log_probs(self.args, len(steps)):
            with self._timed("log_probs"):
                self._log_prob_pass(data, steps, prefix="")

    def _log_prob_pass(self, data: dict[str, Any], steps: list[Any], prefix: str) -> None:
        from slime.backends.megatron import passes

        if path := getattr(self.args, "custom_megatron_before_log_prob_hook_path", None):
            load_function(path)(self.args, self.models, prefix)
        computed = passes.compute_log_probs(self.args, self.models, self._packer, data, steps)
        for name, values in (computed or {}).items():
            if not (prefix and name == "entropy"):
                data[prefix + name] = [None if v is None else v.to(self.accelerator.device) for v in values]

    def _train_steps(self, rollout_id: int, data: dict[str, Any], steps: list[Any]) -> dict[str, float]:
        """All optimizer steps of a rollout; metrics are means over them, learning rates those of the last."""
        from slime.backends.megatron import optimizer, passes

        per_step: list[dict[str, float]] = []
        for i, step in enumerate(steps):
            for model in self.models:
                model.zero_grad_buffer()
            self.optimizer.zero_grad()
            if path := getattr(self.args, "custom_megatron_before_train_step_hook_path", None):
                load_function(path)(self.args, rollout_id, i, self.models, self.optimizer, self.scheduler)
            values = passes.forward_backward(self.args, self.models, self._packer, data, step, self._loss_function)
            result = optimizer.step(self.optimizer)
            self._check_finite(rollout_id, i, values, result)
            if result.is_applied:
                self.scheduler.step(increment=step.global_batch_size)
            self._num_steps += 1
            per_step.append(values | {"grad_norm": result.grad_norm, "global_batch_size": step.global_batch_size})
        metrics = {f"train/{name}": sum(v[name] for v in per_step) / len(per_step) for name in per_step[0]}
        for i, rate in enumerate(optimizer.learning_rates(self.optimizer)):
            metrics[f"train/lr-pg_{i}"] = rate
        metrics["train/step"] = rollout_id * len(steps) + len(steps) - 1
        return metrics

    def _check_finite(self, rollout_id: int, step_id: int, values: dict[str, float], result: Any) -> None:
        """All ranks see the same numbers, so all raise or none."""
        if result.is_applied or not getattr(self.args, "check_for_nan_in_loss_and_grad", True):
            if not result.is_applied:
                logger.warning(
                    "rollout %d, step %d: gradient norm %s, weights left as they were",
                    rollout_id,
                    step_id,
                    result.grad_norm,
                )
            return
        if getattr(self.args, "fp16", False):
            return  # the loss scale was too large; it is lower now
        seen = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(
            f"Rollout {rollout_id}, step {step_id}: the gradient norm is {result.grad_norm} ({seen}). The weights are "
            "still those of before. Look for infinite rewards or log-probs in the rollout, lower --lr, or skip such "
            "steps with --no-check-for-nan-in-loss-and-grad."
        )

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.accelerator.synchronize()
        start = time.perf_counter()
        yield
        self.accelerator.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def _perf_metrics(self, data: dict[str, Any]) -> dict[str, float]:
        """Seconds are those of the slowest rank; tokens those of all ranks."""
        names = sorted(self._seconds)
        device = self.accelerator.device
        seconds = torch.tensor([self._seconds[name] for name in names], dtype=torch.float64, device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        slowest = dict(zip(names, seconds.tolist(), strict=True))
        tokens = torch.tensor(float(sum(data["total_lengths"])), dtype=torch.float64, device=device)
        dist.all_reduce(tokens)
        replicas = self.world_size / self.parallel_config()["dp_size"]
        metrics = {f"perf/{name}_time": value for name, value in slowest.items()}
        metrics["perf/actor_train_tok_per_s"] = tokens.item() / replicas / max(slowest["actor_train"], 1e-9)
        return metrics

    # --- weights and checkpoints -------------------------------------------------------------------------------------

    def weights(self) -> Any:
        """The live weights under HuggingFace names, as a `WeightSource`."""
        return self._weights

    def save(self, rollout_id: int) -> None:
        """Write `{--save}/iter_{rollout_id:07d}`: model, optimizer, schedule, random state."""
        from slime.backends.megatron import checkpoint

        self.wake_up()
        saves_optimizer = not getattr(self.args, "no_save_optim", False)
        checkpoint.save(
            self.args.save,
            rollout_id,
            self.models,
            self.optimizer if saves_optimizer else None,
            self.scheduler if saves_optimizer else None,
        )

    def save_hf(self, path: str) -> None:
        """Write a HuggingFace folder, with the other files of --hf-checkpoint."""
        buckets = self._weights.buckets(_SAVE_BUCKET_BYTES)
        if self.rank == 0:
            save_hf_folder(path, self.args.hf_checkpoint, buckets)
        else:
            for _ in buckets:
                pass
        dist.barrier()

    def sleep(self) -> None:
        """Give back the memory that only training needs."""
        self._memory.release()

    def wake_up(self) -> None:
        """Undo `sleep`; nothing if awake."""
        self._memory.restore()


def _connect(config: Any, models: list[Any], optimizer: Any) -> None:
    """Tell Megatron's schedules how gradients are scaled, summed and held back until the last micro-batch."""
    from megatron.core.distributed import finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    ddp = models[0].ddp_config
    if ddp.overlap_grad_reduce:
        config.no_sync_func = [m.no_sync for m in models] if len(models) > 1 else models[0].no_sync
    if ddp.overlap_param_gather:
        starts = [m.start_param_sync for m in models]
        config.param_sync_func = starts if len(models) > 1 else starts[0]


def wants_reference(args: Namespace) -> bool:
    """Whether a KL term compares with a reference policy."""
    return getattr(args, "kl_coef", 0.0) != 0 or bool(getattr(args, "use_kl_loss", False))


def needs_old_log_probs(args: Namespace, num_steps: int) -> bool:
    """Whether the log-probs before the first update need a pass of their own.

    With one step a rollout the policy that is trained is still the one before the update, so its own log-probs,
    detached, are the old ones.
    """
    if getattr(args, "use_rollout_logprobs", False) and not getattr(args, "get_mismatch_metrics", False):
        return False
    can_reuse = (
        num_steps == 1
        and args.loss_type == "policy_loss"
        and getattr(args, "kl_coef", 0.0) == 0
        and args.advantage_estimator != "gspo"
        and not any(
            getattr(args, name, False)
            for name in ("get_mismatch_metrics", "use_critic", "keep_old_actor", "use_opd", "use_rollout_entropy")
        )
        and (not getattr(args, "use_routing_replay", False) or getattr(args, "use_rollout_routing_replay", False))
    )
    return not can_reuse
