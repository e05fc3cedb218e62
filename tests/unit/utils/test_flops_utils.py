"""FLOPs of a forward pass, counted by hand for tiny shapes."""

from argparse import Namespace

import pytest

from slime.utils.flops_utils import calculate_fwd_flops, is_moe_layer

DENSE = dict(num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1, kv_channels=4, ffn_hidden_size=16)


def test_a_dense_model_by_hand() -> None:
    """One token: q 2*8*8, k and v 2*8*4 each, output 2*8*8, mlp 6*8*16, attention 2*(4+4); twice; head 2*8*10."""
    args = Namespace(**DENSE, vocab_size=10)
    layer = 128 + 64 + 64 + 128 + 768 + 16
    assert calculate_fwd_flops([1], args) == 2 * layer + 160


def test_attention_grows_with_the_square_and_sequences_do_not_mix() -> None:
    args = Namespace(**DENSE, vocab_size=10)
    one, two, four = (calculate_fwd_flops([s], args) for s in (1, 2, 4))
    assert two - 2 * one == 2 * 16 * (4 - 2)
    assert four - 4 * one == 2 * 16 * (16 - 4)
    assert calculate_fwd_flops([1, 2, 4], args) == one + two + four


def test_experts_count_as_often_as_a_token_visits_them() -> None:
    """Layer 0 is dense (16 wide), layer 1 has 2 of 4 experts of 4 and a shared one of 6: 14 wide."""
    args = Namespace(
        **DENSE,
        padded_vocab_size=10,
        num_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=4,
        moe_shared_expert_intermediate_size=6,
        moe_layer_freq=[0, 1],
    )
    dense = calculate_fwd_flops([3], Namespace(**DENSE, vocab_size=10))
    assert dense - calculate_fwd_flops([3], args) == 3 * 6 * 8 * (16 - 14)
    assert [is_moe_layer(args, layer) for layer in range(2)] == [False, True]


def test_latent_attention_by_hand() -> None:
    args = Namespace(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        ffn_hidden_size=16,
        vocab_size=0,
        multi_latent_attention=True,
        q_lora_rank=3,
        kv_lora_rank=5,
        qk_head_dim=4,
        qk_pos_emb_head_dim=2,
        v_head_dim=4,
    )
    queries = 2 * (8 * 3 + 3 * 2 * 6)
    keys_values = 2 * 8 * (5 + 2) + 2 * 5 * 2 * (4 + 4)
    assert calculate_fwd_flops([1], args) == queries + keys_values + 2 * 2 * 4 * 8 + 6 * 8 * 16 + 2 * (6 + 4)


@pytest.mark.parametrize(("frequency", "expected"), [(1, [True, True, True]), (2, [True, False, True])])
def test_every_nth_layer_has_experts(frequency: int, expected: list[bool]) -> None:
    args = Namespace(num_experts=2, moe_layer_freq=frequency)
    assert [is_moe_layer(args, layer) for layer in range(3)] == expected
