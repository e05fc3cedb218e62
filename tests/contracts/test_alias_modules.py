"""Import paths that custom losses and tools use: they exist, have the documented parameters, and compute the same."""

import inspect
from argparse import Namespace
from importlib import import_module

import pytest
import torch

from slime.data.context_parallel import ContextParallel

SIGNATURES = {
    "slime.utils.ppo_utils": {
        "calculate_log_probs_and_entropy": "logits, tokens, tp_group, with_entropy, chunk_size, log_prob_keep_mask, "
        "with_entropy_grad",
        "compute_approx_kl": "log_probs, log_probs_base, kl_loss_type, importance_ratio",
        "chunked_discounted_returns": "rewards, discount, chunk_size",
        "chunked_gae": "rewards, values, gamma, lambd, chunk_size",
        "vanilla_gae": "rewards, values, gamma, lambd",
    },
    "slime.utils.seqlen_balancing": {
        "karmarkar_karp": "seqlen_list, k_partitions, equal_size",
        "greedy_partition": "seqlen_list, k_partitions, equal_size",
        "get_seqlen_balanced_partitions": "seqlen_list, k_partitions, equal_size",
        "first_fit_pack": "lengths, max_tokens",
        "expand_bins_by_splitting": "bins, lengths, num_bins",
        "get_reverse_idx": "idx_map",
    },
    "slime.utils.flops_utils": {"calculate_fwd_flops": "seqlens, args"},
    "slime.utils.distributed_utils": {
        "distributed_masked_whiten": "values, mask, process_group, shift_mean, epsilon",
    },
    "slime.backends.megatron_utils.loss": {
        "compute_advantages_and_returns": "args, rollout_data",
        "policy_loss_function": "args, batch, logits, sum_of_sample_mean",
        "value_loss_function": "args, batch, logits, sum_of_sample_mean",
        "sft_loss_function": "args, batch, logits, sum_of_sample_mean",
        "icepop_function": "args",
        "vanilla_tis_function": "args",
        "reduce_train_step_metrics": "losses_reduced",
    },
    "slime.backends.megatron_utils.cp_utils": {
        "all_gather_with_cp": "tensor, total_length, response_length",
        "slice_log_prob_with_cp": "log_prob, total_length, response_length",
        "slice_with_cp": "tokens, pad_value",
        "get_sum_of_sample_mean": "total_lengths, response_lengths, loss_masks, sample_denoms, "
        "calculate_per_token_loss",
        "get_logits_and_tokens_offset_with_cp": "total_length, response_length",
    },
}


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in SIGNATURES.items() for n in names])
def test_a_documented_name_takes_its_documented_parameters(module: str, name: str) -> None:
    function = getattr(import_module(module), name)
    positional = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert ", ".join(positional) == SIGNATURES[module][name]


@pytest.mark.parametrize("chunk_size", [-1, 2])
def test_log_probs_come_as_a_column_chunked_or_not(chunk_size: int) -> None:
    from slime.utils.ppo_utils import calculate_log_probs_and_entropy

    logits, tokens = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3, 1])
    keep = torch.ones(5, 7, dtype=torch.bool)
    log_probs, entropy = calculate_log_probs_and_entropy(
        logits, tokens, None, with_entropy=True, chunk_size=chunk_size, log_prob_keep_mask=keep
    )
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.gather(1, tokens[:, None]))
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))
    log_probs, entropy = calculate_log_probs_and_entropy(logits[:0], tokens[:0], None, with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)


@pytest.fixture
def packed():
    """Two sequences, one of them without a response, and padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([0, 4, 1])]
    batch = {
        "tokens": tokens,
        "total_lengths": [4, 2, 3],
        "response_lengths": [2, 0, 1],
        "loss_masks": [torch.ones(2), torch.zeros(0), torch.ones(1)],
        "advantages": [torch.tensor([1.0, -1.0]), torch.zeros(0), torch.tensor([2.0])],
        "values": [torch.zeros(2), torch.zeros(0), torch.zeros(1)],
        "returns": [torch.ones(2), torch.zeros(0), torch.ones(1)],
    }
    return batch, torch.randn(1, 11, 8, generator=generator)


def flags(**changes) -> Namespace:
    return Namespace(
        **dict(
            advantage_estimator="grpo",
            calculate_per_token_loss=False,
            custom_pg_loss_reducer_function_path=None,
            entropy_coef=0.0,
            eps_clip=0.2,
            eps_clip_c=None,
            eps_clip_high=0.2,
            get_mismatch_metrics=False,
            log_probs_chunk_size=-1,
            rollout_temperature=0.5,
            use_kl_loss=False,
            use_opsm=False,
            use_rollout_logprobs=False,
            use_tis=False,
            value_clip=10.0,
        )
        | changes
    )


def test_a_custom_loss_can_build_on_the_losses_from_logits(packed) -> None:
    """Responses 3, 4 are predicted by rows 1, 2; response 1 by row 7, the row before the last of its sequence."""
    from slime.backends.megatron_utils import loss as losses
    from slime.backends.megatron_utils.cp_utils import get_sum_of_sample_mean

    batch, logits = packed
    reduce = get_sum_of_sample_mean(batch["total_lengths"], batch["response_lengths"], batch["loss_masks"])
    rows = (logits[0, [1, 2, 7]] / 0.5).log_softmax(-1)
    expected = rows.gather(1, torch.tensor([[3], [4], [1]])).flatten()

    loss, metrics = losses.sft_loss_function(flags(), batch, logits, reduce)
    torch.testing.assert_close(loss, -((expected[0] + expected[1]) / 2 + expected[2]))
    assert list(metrics) == ["loss"]

    logits.requires_grad_()
    loss, metrics = losses.policy_loss_function(flags(), batch, logits, reduce)
    assert loss.item() == pytest.approx(-(0 / 2 + 2))
    assert metrics["entropy_loss"].item() > 0
    loss.backward()
    assert logits.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [1, 2, 7]

    values = torch.arange(11.0).view(1, 11, 1)
    loss, _ = losses.value_loss_function(flags(), batch, values, reduce)
    assert loss.item() == pytest.approx((0 + 1) / 2 + 36)


def test_context_parallel_ranks_are_told_once() -> None:
    from slime.backends.megatron_utils import cp_utils

    response = torch.arange(6)
    assert cp_utils.slice_log_prob_with_cp(response, 10, 6) is response
    assert cp_utils.all_gather_with_cp(response, 10, 6) is response
    cp_utils.set_context_parallel(ContextParallel(1, 2))
    try:
        assert cp_utils.get_logits_and_tokens_offset_with_cp(10, 6)[3] == ((4, 7), (7, 10))
        assert cp_utils.slice_log_prob_with_cp([0, 1, 2, 3, 4, 5], 10, 6) == [0, 1, 2, 3, 4, 5]
        assert cp_utils.slice_with_cp(torch.arange(8), 0).tolist() == [2, 3, 4, 5]
        with pytest.raises(ValueError, match="not available under context parallelism"):
            from slime.backends.megatron_utils.loss import get_responses

            get_responses(torch.zeros(1, 2, 3), tokens=[], total_lengths=[], response_lengths=[])
    finally:
        cp_utils.set_context_parallel(ContextParallel())
