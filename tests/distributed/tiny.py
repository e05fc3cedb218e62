"""Tiny random models and rollouts for training tests, made the same on every rank from a seed."""

import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slime.data.batch import split_train_data_by_dp

VOCAB = 131


def save_hf_model(folder: Path, model_type: str, *, seed: int = 0, **settings: Any) -> Path:
    """A random HuggingFace model with weights large enough that every part of it shows in the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    if model_type == "qwen3":
        defaults["head_dim"] = 12
    config = AutoConfig.for_model(model_type, **(defaults | settings))
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    size = 0.15 * min(1.0, (48 / config.hidden_size) ** 0.5)  # activations stay of one size, and rounding with them
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * size
            parameter.copy_(1 + noise if "norm" in name else noise)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def training_args(folder: Path, **changes: Any) -> Namespace:
    """What a resolved command line gives the trainer, for fp32 GRPO in static micro-batches of two."""
    values: dict[str, Any] = dict(
        hf_checkpoint=str(folder), device="cpu", bf16=False, fp16=False, seed=7, load=None, save=None,
        distributed_timeout_minutes=1, train_threads=1, use_distributed_optimizer=True,
        optimizer="adam", lr=1e-2, min_lr=0.0, lr_decay_style="constant", lr_warmup_fraction=None, weight_decay=0.01,
        adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-3, clip_grad=1.0,
        num_rollout=4, rollout_batch_size=4, n_samples_per_prompt=2, global_batch_size=8, num_steps_per_rollout=1,
        num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=6, num_query_groups=2, kv_channels=8,
        vocab_size=VOCAB, group_query_attention=True, swiglu=True, multi_latent_attention=False,
        micro_batch_size=2, use_dynamic_batch_size=False, max_tokens_per_gpu=None, balance_data=False,
        balance_by_flops=False, share_group_prompts=True,
        loss_type="policy_loss", advantage_estimator="grpo", custom_loss_function_path=None,
        custom_advantage_function_path=None, custom_pg_loss_reducer_function_path=None, custom_tis_function_path=None,
        compute_advantages_and_returns=True, calculate_per_token_loss=False, rollout_temperature=1.0,
        eps_clip=0.2, eps_clip_high=0.2, eps_clip_c=None, entropy_coef=0.0, kl_coef=0.0, use_kl_loss=False,
        kl_loss_coef=0.0, kl_loss_type="k3", use_unbiased_kl=False, gamma=1.0, lambd=1.0, normalize_advantages=False,
        use_rollout_logprobs=False, use_tis=False, get_mismatch_metrics=False, use_opsm=False, opsm_delta=1e-4,
        use_opd=False, opd_kl_coef=1.0, use_critic=False, keep_old_actor=False, log_probs_chunk_size=-1,
        use_rollout_entropy=False, only_train_params_name_list=None, freeze_params_name_list=None,
    )  # fmt: skip
    unknown = set(changes) - set(values) - _OTHERS
    assert not unknown, f"misspelt: {unknown}"
    values |= changes
    fields = {"check_for_nan_in_grad": "check_for_nan_in_loss_and_grad", "bucket_size": "ddp_bucket_size"}
    fields |= {name: name for name in _MEGATRON_FIELDS}
    dests = {field: dest for field, dest in fields.items() if values.get(dest) is not None}
    return Namespace(**values, megatron_field_dests=dests)


_MEGATRON_FIELDS = (
    "optimizer", "lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad",
    "use_distributed_optimizer", "calculate_per_token_loss", "tensor_model_parallel_size", "sequence_parallel",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "overlap_grad_reduce",
    "overlap_param_gather", "recompute_granularity", "recompute_method", "recompute_num_layers", "deterministic_mode",
    "microbatch_group_size_per_vp_stage", "recompute_modules",
)  # fmt: skip
"""Attributes that are fields of Megatron's dataclasses: what `parse_args` records in `megatron_field_dests`."""

_OTHERS = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "overlap_grad_reduce",
    "overlap_param_gather", "ref_load", "ref_update_interval", "custom_megatron_before_train_step_hook_path",
    "custom_megatron_before_log_prob_hook_path", "custom_megatron_init_path", "rollout_data_postprocess_path",
    "check_for_nan_in_loss_and_grad", "finetune", "no_load_optim", "no_save_optim", "start_rollout_id",
    "recompute_granularity", "recompute_method", "recompute_num_layers", "virtual_pipeline_model_parallel_size",
    "data_pad_size_multiplier", "no_load_rng", "deterministic_mode", "microbatch_group_size_per_vp_stage",
    "ddp_bucket_size", "recompute_modules",
    "async_save", "keep_last", "ckpt_step", "ref_ckpt_step", "allow_pickle_checkpoints",
    "use_checkpoint_opt_param_scheduler", "lr_decay_iters",
    "use_pytorch_profiler", "profile_target", "profile_step_start", "profile_step_end", "profile_ranks", "run_dir",
}  # fmt: skip


def rollout(
    *,
    num_groups: int = 4,
    samples_per_group: int = 2,
    seed: int = 0,
    response_lengths: Sequence[int] | None = None,
    rollout_log_probs: bool = True,
    longest_prompt: int = 11,
    longest_response: int = 13,
) -> dict[str, Any]:
    """Train data of a rollout: groups with a common prompt, responses of unequal length, some tokens masked."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape or (1,), generator=generator)

    count = num_groups * samples_per_group
    prompts = [integers(0, VOCAB, int(integers(3, longest_prompt + 1))) for _ in range(num_groups)]
    if response_lengths is None:
        response_lengths = [int(integers(1, longest_response + 1)) for _ in range(count)]
    responses = [integers(0, VOCAB, length) for length in response_lengths]
    masks = [(torch.rand(length, generator=generator) > 0.2).int().tolist() for length in response_lengths]
    data: dict[str, Any] = {
        "tokens": [torch.cat([prompts[i // samples_per_group], responses[i]]).tolist() for i in range(count)],
        "response_lengths": list(response_lengths),
        "rewards": torch.randn(count, generator=generator).tolist(),
        "raw_reward": torch.rand(count, generator=generator).tolist(),
        "truncated": [0] * count,
        "sample_indices": list(range(count)),
        "group_indices": [i // samples_per_group for i in range(count)],
        "rollout_ids": list(range(count)),
        "loss_masks": masks,
        "rollout_mask_sums": [sum(mask) for mask in masks],
    }
    if rollout_log_probs:
        noise = [torch.randn(length, generator=generator) * 0.1 - 5 for length in response_lengths]
        data["rollout_log_probs"] = [values.tolist() for values in noise]
    return data


@dataclass(frozen=True)
class Case:
    """A model, how it is trained, and two rollouts of one optimizer step each, drawn from a seed.

    Every layout of 2 x 2 x 2 ranks can train it, with two virtual stages a pipeline rank as well.
    """

    seed: int
    model_type: str
    shape: dict[str, Any]
    changes: dict[str, Any]
    rollouts: list[dict[str, Any]]

    def save(self, folder: Path) -> Path:
        return save_hf_model(folder, self.model_type, seed=self.seed, **self.shape)

    def args(self, folder: Path, **changes: Any) -> Namespace:
        """`changes` is where the layout comes in."""
        shape = self.shape
        ours: dict[str, Any] = dict(
            num_layers=shape["num_hidden_layers"], hidden_size=shape["hidden_size"],
            ffn_hidden_size=shape["intermediate_size"], num_attention_heads=shape["num_attention_heads"],
            num_query_groups=shape["num_key_value_heads"], kv_channels=shape["head_dim"],
        )  # fmt: skip
        return training_args(folder, **(ours | self.changes | changes))

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.model_type} {self.shape}, {self.changes}"


def random_case(seed: int) -> Case:
    """Any family, tied or not, any numbers of heads, layers and tokens, packed in any way."""
    draw = random.Random(seed)
    groups, head_dim = draw.choice([2, 4]), draw.choice([4, 8, 12])
    heads = groups * draw.choice([1, 2, 3])
    model_type = draw.choice(["llama", "qwen2", "qwen3"])
    shape = dict(
        num_hidden_layers=draw.choice([4, 8]),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        hidden_size=draw.choice([16, 24, 40]) if model_type == "qwen3" else heads * head_dim,
        intermediate_size=2 * draw.randint(8, 40),
        tie_word_embeddings=draw.random() < 0.5,
    )
    packing: dict[str, Any] = dict(micro_batch_size=draw.choice([1, 2]))
    if draw.random() < 0.5:
        packing = dict(use_dynamic_batch_size=True, max_tokens_per_gpu=draw.randint(20, 120))
        packing["balance_by_flops"] = draw.random() < 0.5
    samples_per_group = draw.choice([1, 2, 4])
    changes = packing | dict(
        lr=3e-3,  # a wrong gradient shows in the third digit, a rounded one in the seventh
        balance_data=draw.random() < 0.5,
        share_group_prompts=draw.random() < 0.7,
        calculate_per_token_loss=draw.random() < 0.5,
        use_kl_loss=(uses_kl := draw.random() < 0.5),
        kl_loss_coef=0.1 if uses_kl else 0.0,
        n_samples_per_prompt=samples_per_group,
        rollout_batch_size=8 // samples_per_group,
    )
    sizes = dict(longest_prompt=draw.choice([4, 12, 40]), longest_response=draw.choice([3, 16, 60]))
    rollouts = [
        rollout(num_groups=8 // samples_per_group, samples_per_group=samples_per_group, seed=seed + i, **sizes)
        for i in range(2)
    ]
    return Case(seed, model_type, shape, changes, rollouts)


def train(args: Namespace, rank: int, world_size: int, port: int, rollouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Build a trainer, train on the rollouts, and return metrics, the first gradient and the final weights."""
    from slime.backends.megatron.trainer import MegatronTrainer

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    start = trainer.init()
    metrics, gradient = [], {}
    for i, data in enumerate(rollouts):
        metrics.append(trainer.train(start + i, shard_of(trainer, data)))
        if i == 0 and not args.use_distributed_optimizer:
            gradient = gradients(trainer)
    result = {"start": start, "metrics": metrics, "gradient": gradient, "weights": hf_weights(trainer)}
    trainer.close()
    return result


def shard_of(trainer: Any, data: dict[str, Any]) -> dict[str, Any]:
    shards = split_train_data_by_dp(trainer.args, data, trainer.parallel_config())
    return shards[trainer.data_parallel_rank]


def hf_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights under HuggingFace names; on rank 0."""
    return {name: tensor.clone() for bucket in trainer.weights().buckets(1 << 20) for name, tensor in bucket}


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of the summed gradients after a step (clipping scales the optimizer's copy as well: keep clip_grad 0)."""
    from slime.backends.megatron.model import global_parameters

    return {name: parameter.main_grad.clone() for name, parameter in global_parameters(trainer.job.models)}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys() and ours
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)
