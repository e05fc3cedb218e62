"""A training job as one rank sees it: the model and its optimizer, loaded, trained rollout by rollout, saved."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from slime.algorithm.advantages import compute_advantages_and_returns
from slime.algorithm.loss import get_loss_function
from slime.algorithm.metrics import reduce_contributions, rollout_data_contributions
from slime.algorithm.passes import first_step_with_old_log_probs, needs_ref_log_probs
from slime.backends.megatron import checkpoint, parallel
from slime.backends.megatron import optimizer as optimizers
from slime.backends.megatron.accelerator import Accelerator
from slime.backends.megatron.config import refuses_non_finite_steps
from slime.backends.megatron.memory import TrainingMemory
from slime.backends.megatron.microbatches import Packer, TrainStep, local_rollout, train_steps
from slime.backends.megatron.model import build_models, unwrap
from slime.backends.megatron.passes import compute_log_probs, forward_backward, step_metrics
from slime.backends.megatron.profiling import MemoryHistory, Profiler
from slime.backends.megatron.reference import HostWeights
from slime.backends.megatron.roll_call import RollCall
from slime.backends.megatron.stopwatch import Stopwatch
from slime.backends.megatron.train_dump import save_train_dump
from slime.backends.megatron.transfers import sent, sent_together
from slime.backends.megatron.weights import MegatronWeights, load_hf_weights
from slime.models.families import family_of
from slime.models.hf_folder import save_hf_folder
from slime.models.shape import read_config
from slime.utils.checkpoint_folder import Checkpoint, check_space, find_checkpoint
from slime.utils.misc import load_function

logger = logging.getLogger(__name__)

_SAVE_BUCKET_BYTES = 1 << 30


class TrainingJob:
    """See `MegatronTrainer` for the verbs. Building one joins the process groups; weights come with `load`."""

    def __init__(
        self,
        args: Namespace,
        accelerator: Accelerator,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
    ) -> None:
        self.args, self.rank, self.world_size = args, rank, world_size
        self.memory_history = MemoryHistory(args, rank)
        parallel.initialize(args, accelerator, rank, world_size, master_addr, master_port)
        self.roll_call = RollCall(master_addr, master_port, rank, world_size)
        if path := getattr(args, "custom_megatron_init_path", None):
            load_function(path)(args)
        config = read_config(args.hf_checkpoint)
        family = family_of(config)
        shape = family.shape_of(config)
        self.models = build_models(args, shape)
        if rank == 0:
            logger.info("Layers are Megatron's local ones; %s.", unwrap(self.models[0]).kernels.name)
        self.optimizer = optimizers.build_optimizer(args, self.models)
        self.scheduler = optimizers.build_scheduler(args, self.optimizer)
        self._tell_schedules()
        self.weights = MegatronWeights(self.models, family, shape, self.roll_call)
        self.memory = TrainingMemory(self.models, self.optimizer, accelerator)
        self.reference: HostWeights | None = None
        self._saver = checkpoint.Saver(args, accelerator) if getattr(args, "save", None) else None
        self._device = accelerator.device
        self._packer = Packer(args, self.parallel_config, accelerator.device)
        self._loss_function = get_loss_function(args)
        self.profiler = Profiler(args, rank, accelerator)
        self._stopwatch = Stopwatch(accelerator, self.profiler)

    def _tell_schedules(self) -> None:
        """How Megatron's schedules scale gradients, sum them, and hold them back until the last micro-batch."""
        config, ddp = unwrap(self.models[0]).config, self.models[0].ddp_config
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        is_single = len(self.models) == 1
        if ddp.overlap_grad_reduce:
            functions = [model.no_sync for model in self.models]
            config.no_sync_func = functions[0] if is_single else functions
        if ddp.overlap_param_gather:
            functions = [model.start_param_sync for model in self.models]
            config.param_sync_func = functions[0] if is_single else functions

    @property
    def parallel_config(self) -> dict[str, int]:
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        return {
            "dp_size": parallel_state.get_data_parallel_world_size(),
            "cp_size": parallel_state.get_context_parallel_world_size(),
            "vpp_size": len(self.models),
            "microbatch_group_size_per_vp_stage": (
                getattr(self.args, "microbatch_group_size_per_vp_stage", None) or pipeline
            ),
        }

    @property
    def data_parallel_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    # --- weights and checkpoints ---------------------------------------------------------------------------------

    def load(self) -> int:
        """Load the reference (kept apart), then the policy; returns the first rollout id.

        The policy comes from --ckpt-step or the newest iteration in --load; without one, from --load if that is a
        HuggingFace folder, or else from --hf-checkpoint.
        """
        args = self.args
        load = getattr(args, "load", None)
        found = find_checkpoint(load, getattr(args, "ckpt_step", None))
        initial = load if found is None and _is_hf_folder(load) else args.hf_checkpoint
        if needs_ref_log_probs(args):
            reference = getattr(args, "ref_load", None) or initial
            self._load_weights(reference, getattr(args, "ref_ckpt_step", None))
            self.reference = HostWeights(self.models)
        else:
            reference = None
        start = getattr(args, "start_rollout_id", None)
        first = 0
        if found is not None:
            self._load_checkpoint(found)
            if found.iteration is not None and not getattr(args, "finetune", False):
                first = found.iteration + 1
        else:
            if reference is None or Path(reference).resolve() != Path(initial).resolve():
                self._load_weights(initial)
            self.optimizer.reload_model_params()
        return first if start is None else int(start)

    def _load_weights(self, path: str, step: int | None = None) -> None:
        """Weights alone, from a HuggingFace folder or an iteration (the newest unless given) of a Megatron one."""
        found = find_checkpoint(path, step, flag="--ref-ckpt-step")
        if found is None:
            load_hf_weights(self.models, path)
        else:
            self._note_use(found)
            checkpoint.load(found, self.models, allow_pickle=self._allows_pickle)

    def _load_checkpoint(self, found: Checkpoint) -> None:
        """A checkpoint of a run: to go on with it, or (--finetune, --no-load-optim, `release`) its weights alone."""
        args = self.args
        self._note_use(found)
        if getattr(args, "finetune", False) or getattr(args, "no_load_optim", False) or found.iteration is None:
            checkpoint.load(found, self.models, allow_pickle=self._allows_pickle)
            self.optimizer.reload_model_params()
            return
        with_random_state = not getattr(args, "no_load_rng", False)
        checkpoint.load(
            found, self.models, self.optimizer, self.scheduler,
            with_random_state=with_random_state, allow_pickle=self._allows_pickle,
        )  # fmt: skip

    def _note_use(self, found: Checkpoint) -> None:
        if self._saver is not None:
            self._saver.protected.add(found.path)

    @property
    def _allows_pickle(self) -> bool:
        return bool(getattr(self.args, "allow_pickle_checkpoints", False))

    def save(self, rollout_id: int) -> None:
        if self._saver is None:
            raise ValueError("There is no folder to save to: give --save.")
        self.memory.restore()
        if getattr(self.args, "no_save_optim", False):
            self._saver.save(rollout_id, self.models)
        else:
            self._saver.save(rollout_id, self.models, self.optimizer, self.scheduler)

    def poll_saves(self) -> None:
        """Commit what --async-save wrote in the background, once every rank has."""
        if self._saver is not None:
            self._saver.poll()

    def finish_saves(self, timeout_s: float | None = None) -> None:
        if self._saver is not None:
            self._saver.finish(timeout_s)

    def save_hf(self, path: str) -> None:
        self.poll_saves()
        if self._saver is not None:
            self._saver.finish_deleting()  # an export may need the room
        buckets = self.weights.buckets(_SAVE_BUCKET_BYTES)
        if self.rank == 0:
            check_space(Path(path).absolute().parent, self.weights.size_bytes, f"The HuggingFace folder {path}")
            save_hf_folder(path, self.args.hf_checkpoint, buckets)
        else:
            for _ in buckets:
                pass
        dist.barrier()

    def close(self) -> None:
        self.roll_call.close()
        parallel.close()

    # --- training --------------------------------------------------------------------------------------------------

    def train(self, rollout_id: int, shard: dict[str, Any]) -> dict[str, float]:
        args = self.args
        self.poll_saves()
        self.memory.restore()
        self._stopwatch.reset()
        with self._stopwatch.timed("data_preprocess"):
            data = self._on_device(local_rollout(shard))
            steps = train_steps(data)
            first_with_old = first_step_with_old_log_probs(args, len(steps))
        self._add_ref_log_probs(data, steps)
        if first_with_old == 0:
            self._add_old_log_probs(data, steps)
        if args.compute_advantages_and_returns and parallel.is_last_stage():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            compute_advantages_and_returns(args, data, process_group=group)
        if path := getattr(args, "rollout_data_postprocess_path", None):
            load_function(path)(args, rollout_id, data)
        metrics = self._rollout_metrics(data, sum(step.global_batch_size for step in steps))
        if 0 < first_with_old < len(steps):
            self._add_old_log_probs(data, steps[first_with_old:])
        with self._stopwatch.timed("actor_train"):
            metrics |= self._train_steps(rollout_id, data, steps)
            self._finish_gathering()
        if getattr(args, "save_debug_train_data", None):
            save_train_dump(args, rollout_id, self.rank, data)
        self._update_reference(rollout_id)
        num_tokens = sum(data["total_lengths"])
        return metrics | self._stopwatch.metrics(num_tokens, self.world_size // self.parallel_config["dp_size"])

    def _on_device(self, data: dict[str, Any]) -> dict[str, Any]:
        """Per-sample tensors go to the device once; tokens with their micro-batch."""
        for key, values in data.items():
            if isinstance(values, list) and values and isinstance(values[0], Tensor) and key != "tokens":
                is_flat = all(value.dim() == 1 and value.dtype is values[0].dtype for value in values)
                data[key] = (
                    sent_together(values, self._device) if is_flat else [sent(value, self._device) for value in values]
                )
        return data

    def _add_ref_log_probs(self, data: dict[str, Any], steps: list[TrainStep]) -> None:
        """`ref_log_probs` where a KL term needs them."""
        if self.reference is not None:
            with self._stopwatch.timed("ref_log_probs"), self.reference.swapped_in():
                self._log_prob_pass(data, steps, prefix="ref_")

    def _add_old_log_probs(self, data: dict[str, Any], steps: list[TrainStep]) -> None:
        """`log_probs` of the samples of these steps, whose loss cannot take its own; None for the others."""
        with self._stopwatch.timed("log_probs"):
            self._log_prob_pass(data, steps, prefix="")

    def _log_prob_pass(self, data: dict[str, Any], steps: list[TrainStep], prefix: str) -> None:
        if path := getattr(self.args, "custom_megatron_before_log_prob_hook_path", None):
            load_function(path)(self.args, self.models, prefix)
        computed = compute_log_probs(self.args, self.models, self._packer, data, steps) or {}
        data[f"{prefix}log_probs"] = computed.get("log_probs")
        if not prefix and "entropy" in computed:
            data["entropy"] = computed["entropy"]

    def _train_steps(self, rollout_id: int, data: dict[str, Any], steps: list[TrainStep]) -> dict[str, float]:
        """All optimizer steps of a rollout; metrics are means over them, learning rates those of the last."""
        per_step = [self._train_step(rollout_id, i, data, step) for i, step in enumerate(steps)]
        metrics = {f"train/{name}": sum(values[name] for values in per_step) / len(steps) for name in per_step[0]}
        for i, rate in enumerate(optimizers.learning_rates(self.optimizer)):
            metrics[f"train/lr-pg_{i}"] = rate
        metrics["train/step"] = rollout_id * len(steps) + len(steps) - 1
        return metrics

    def _train_step(self, rollout_id: int, step_id: int, data: dict[str, Any], step: TrainStep) -> dict[str, float]:
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        if path := getattr(self.args, "custom_megatron_before_train_step_hook_path", None):
            load_function(path)(self.args, rollout_id, step_id, self.models, self.optimizer, self.scheduler)
        records = forward_backward(self.args, self.models, self._packer, data, step, self._loss_function)
        result = optimizers.step(self.optimizer)
        metrics = step_metrics(self.args, records, step)
        if result.is_applied:
            self.scheduler.step(increment=step.global_batch_size)
        else:
            self._refuse_step(rollout_id, step_id, metrics, result.grad_norm)
        return metrics | {"grad_norm": result.grad_norm, "global_batch_size": float(step.global_batch_size)}

    def _refuse_step(self, rollout_id: int, step_id: int, metrics: dict[str, float], grad_norm: float) -> None:
        """A gradient was not finite. All ranks see the same numbers, so all raise or none does.

        In fp16 that only means that the loss scale was too large; it is lower now.
        """
        seen = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        what = f"Rollout {rollout_id}, step {step_id}: the gradient norm is {grad_norm} ({seen})."
        if getattr(self.args, "fp16", False) or not refuses_non_finite_steps(self.args):
            logger.warning("%s The step is skipped.", what)
            return
        raise FloatingPointError(
            f"{what} The weights are still those of before. Look for infinite rewards or log-probs in the rollout, "
            "lower --lr, or skip such steps with --no-check-for-nan-in-loss-and-grad."
        )

    def _finish_gathering(self) -> None:
        """With --overlap-param-gather the next forward pass would fetch the other ranks' new weights; who reads weights
        in between must find them."""
        for model in self.models:
            if model.ddp_config.overlap_param_gather:
                model.start_param_sync(force_sync=True)

    def _update_reference(self, rollout_id: int) -> None:
        interval = getattr(self.args, "ref_update_interval", None)
        if self.reference is not None and interval and (rollout_id + 1) % interval == 0:
            with self._stopwatch.timed("ref_model_update"):
                self.reference.update()

    def _rollout_metrics(self, data: dict[str, Any], num_rollouts: int) -> dict[str, float]:
        """What the rollout looks like before training on it: means over all ranks, under `rollout/`."""
        means: dict[str, float] = {}
        if parallel.is_last_stage():
            mine = data | {"raw_reward": data.get("local_raw_reward")}
            dp_size = self.parallel_config["dp_size"]
            contributions = rollout_data_contributions(self.args, mine, dp_size=dp_size, num_rollouts=num_rollouts)
            means = reduce_contributions(parallel.gather_over_data_parallel(contributions))
        return {f"rollout/{name}": value for name, value in parallel.from_last_stage(means).items()}


def _is_hf_folder(path: str | None) -> bool:
    return path is not None and (Path(path) / "config.json").is_file()
