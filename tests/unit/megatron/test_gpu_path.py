"""What the trainer does on a GPU, with plain functions in the place of its kernels, trains what a CPU trains."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.pool import RankPool

ROLLOUT = tiny.rollout(seed=3, longest_prompt=40, longest_response=60)


def _flash(query: Tensor, key: Tensor, value: Tensor, sequences: Any, scale: float) -> Tensor:
    """The last query of each sequence stands at its last key."""
    parts = []
    lengths = (sequences.query_lengths, sequences.key_lengths, sequences.key_lengths)
    for tensors in zip(*(x.split(n) for x, n in zip((query, key, value), lengths, strict=True)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in tensors)
        sees = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def _train(rank: int, world_size: int, port: int, args: Any, rollouts: Any, as_a_gpu: bool) -> Any:
    from slime.backends.megatron import gpu_attention, kernels, model, packed

    def segments(batch: Any, *rest: Any) -> Any:
        described = packed.packed_segments(batch, *rest)
        if batch.has_shared_prompts:
            described.taken_keys = packed.taken_keys(batch, batch.input_ids.device)
        described.blocks = []
        return described

    with ExitStack() as patches:
        if as_a_gpu:
            pieces = (*kernels._OF_TORCH, kernels.attention_named(kernels.ATTENTION_NAMES[0]))
            chosen = kernels.Kernels("as on a GPU", *pieces, angles_in_float32=True)
            patches.enter_context(patch.object(model, "kernels_for", lambda *_: chosen))
            patches.enter_context(patch.object(model, "packed_segments", segments))
            patches.enter_context(patch.object(gpu_attention, "_flash", _flash))
            patches.enter_context(patch.object(gpu_attention, "_by_cudnn", _by_cudnn))
            patches.enter_context(patch.object(gpu_attention, "_LONG", 20))
        return tiny.train(args, rank, world_size, port, rollouts)


@pytest.mark.parametrize(
    "changes",
    [
        dict(micro_batch_size=4),
        dict(micro_batch_size=4, recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
        dict(share_group_prompts=False, num_steps_per_rollout=2, global_batch_size=4),
    ],
    ids=["shared prompts", "recomputed", "whole sequences, two steps"],
)
def test_a_gpu_would_train_what_a_cpu_trains(ranks: RankPool, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Sequences of 20 rows and more go alone, with the keys of their prompt, as those of 4,096 do on a GPU."""
    args = tiny.training_args(tiny.save_hf_model(tmp_path / "model", "qwen3"), kv_channels=12, **changes)
    cpu, gpu = (ranks.run(_train, 1, args, [ROLLOUT], as_a_gpu)[0] for as_a_gpu in (False, True))
    assert gpu["metrics"][0]["train/grad_norm"] == pytest.approx(cpu["metrics"][0]["train/grad_norm"], rel=1e-5)
    assert tiny.largest_difference(cpu["weights"], gpu["weights"]) < 2e-6
