"""Digests of fused, padded and sharded tensors, as an SGLang server takes them of its loaded weights."""

import hashlib

import pytest
import torch

from slime.backends.sglang.checksum import (
    FusedTensorDigests,
    TensorParallel,
    algorithm_of,
    begin_digest,
    expected_checksums,
    fmix64,
    pad_vocabulary,
)

HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, HIDDEN, FFN, VOCAB = 4, 4, 2, 16, 24, 70


def layer(prefix: str = "model.layers.0") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "self_attn.q_proj.weight": (NUM_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.q_proj.bias": (NUM_HEADS * HEAD_DIM,),
        "self_attn.k_proj.bias": (NUM_KV_HEADS * HEAD_DIM,),
        "self_attn.v_proj.bias": (NUM_KV_HEADS * HEAD_DIM,),
        "self_attn.o_proj.weight": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
    }
    return {f"{prefix}.{name}": torch.randn(shape) for name, shape in shapes.items()}


def sha(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def test_query_key_value_and_gate_up_are_digested_as_one_tensor_each():
    weights = layer()
    p = "model.layers.0."
    attention = p + "self_attn."
    assert expected_checksums(weights.items(), "qwen2") == {
        attention + "qkv_proj.weight": sha(*(weights[f"{attention}{x}_proj.weight"] for x in "qkv")),
        attention + "qkv_proj.bias": sha(*(weights[f"{attention}{x}_proj.bias"] for x in "qkv")),
        attention + "o_proj.weight": sha(weights[attention + "o_proj.weight"]),
        p + "mlp.gate_up_proj.weight": sha(weights[p + "mlp.gate_proj.weight"], weights[p + "mlp.up_proj.weight"]),
        p + "mlp.down_proj.weight": sha(weights[p + "mlp.down_proj.weight"]),
        p + "input_layernorm.weight": sha(weights[p + "input_layernorm.weight"]),
    }


def test_buckets_may_split_a_fused_tensor_and_come_in_any_order():
    weights = layer()
    digests = FusedTensorDigests("llama")
    for name in reversed(weights):
        digests.add([(name, weights[name])])
    assert digests.result() == expected_checksums(weights.items(), "llama")


def test_one_flipped_bit_of_a_part_changes_the_fused_digest_only():
    weights = layer()
    before = expected_checksums(weights.items(), "llama")
    weights["model.layers.0.self_attn.v_proj.weight"].view(torch.uint8)[0, 0] ^= 1
    after = expected_checksums(weights.items(), "llama")
    assert [name for name in before if before[name] != after[name]] == ["model.layers.0.self_attn.qkv_proj.weight"]


def test_a_part_that_never_came_is_an_error_that_names_it():
    weights = layer()
    del weights["model.layers.0.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.qkv_proj\.weight has q_proj, v_proj but k_proj never"):
        expected_checksums(weights.items(), "llama")


def test_the_vocabulary_is_padded_with_zero_rows_to_a_multiple_of_64():
    table = torch.randn(VOCAB, HIDDEN)
    assert expected_checksums([("model.embed_tokens.weight", table)], "llama") == {
        "model.embed_tokens.weight": sha(table, torch.zeros(128 - VOCAB, HIDDEN))
    }
    assert pad_vocabulary(torch.randn(128, 2)).shape == (128, 2)
    assert pad_vocabulary(table, tp_size=3).shape == (192, HIDDEN)


def test_ranks_hold_heads_rows_or_columns_as_sglang_shards_them():
    weights, p = layer(), "model.layers.0."
    sharded = expected_checksums(weights.items(), "qwen2", tp_size=2, num_key_value_heads=NUM_KV_HEADS)
    q, k, v = (weights[f"{p}self_attn.{x}_proj.weight"] for x in "qkv")
    gate, up = weights[p + "mlp.gate_proj.weight"], weights[p + "mlp.up_proj.weight"]
    assert sharded[f"tp1:{p}self_attn.qkv_proj.weight"] == sha(q[8:], k[4:], v[4:])
    assert sharded[f"tp0:{p}mlp.gate_up_proj.weight"] == sha(gate[:12], up[:12])
    assert sharded[f"tp1:{p}mlp.down_proj.weight"] == sha(weights[p + "mlp.down_proj.weight"][:, 12:])
    assert sharded[f"tp0:{p}self_attn.o_proj.weight"] == sha(weights[p + "self_attn.o_proj.weight"][:, :8])
    assert sharded[f"tp0:{p}input_layernorm.weight"] == sharded[f"tp1:{p}input_layernorm.weight"]
    assert len(sharded) == 2 * len(expected_checksums(weights.items(), "qwen2"))


def test_with_more_ranks_than_key_heads_neighbours_hold_the_same_head():
    weights, name = layer(), "model.layers.0.self_attn.qkv_proj.weight"
    sharded = expected_checksums(weights.items(), "qwen2", tp_size=4, num_key_value_heads=NUM_KV_HEADS)
    q, k, v = (weights[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    assert sharded[f"tp1:{name}"] == sha(q[4:8], k[:4], v[:4])
    assert sharded[f"tp2:{name}"] == sha(q[8:12], k[4:], v[4:])


def test_sharding_needs_the_number_of_key_heads():
    with pytest.raises(ValueError, match="num_key_value_heads"):
        FusedTensorDigests("llama", TensorParallel(2))


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'gpt_oss'.*llama, qwen2, qwen3.*--rollout-engine embedded"):
        FusedTensorDigests("gpt_oss")


def test_bfloat16_is_digested_by_its_own_bytes():
    tensor = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert begin_digest([tensor], "sha256")() == hashlib.sha256(b"\x80\x3f\x00\x40").hexdigest()[:16]


@pytest.mark.parametrize(
    ("num_bytes", "value"),
    [(1, 0x3D93A6540B54EF2A), (4, 0x39CAAD224474533B), (1030, 0xE5FF63C139C6B370), (40000, 0x646ACFE0463A5A5E)],
)
def test_the_cuda_servers_hash_gives_the_values_of_its_kernel(num_bytes, value):
    """Values of SGLang 0.5.23's Triton kernel, run under Triton's interpreter; 40000 bytes are two tiles."""
    assert fmix64((torch.arange(num_bytes) * 37 % 251).to(torch.uint8)) == value
    assert algorithm_of("cuda") == "fmix64" and algorithm_of("cpu") == "sha256"


def test_the_cuda_servers_hash_does_not_depend_on_how_it_is_cut_into_steps(monkeypatch):
    from slime.backends.sglang import checksum

    data = (torch.arange(200_001) * 37 % 251).to(torch.uint8)
    whole = fmix64(data)
    monkeypatch.setattr(checksum, "_STEP_TILES", 1)
    assert fmix64(data) == whole
    assert fmix64(data[1:]) != whole
