"""Counts the floating-point operations of a forward pass from the model's shape.

Letters: s tokens of a sequence, h hidden size, d head dimension, V vocabulary size. One multiply-add is 2 operations.
Attention counts half of the [s, s] products, as a causal mask leaves them.
"""

from argparse import Namespace
from collections.abc import Iterable


def calculate_fwd_flops(seqlens: Iterable[int], args: Namespace) -> float:
    """Operations of one forward pass over these sequences, the language-model head on every token included.

    Args:
        seqlens: tokens of each sequence; attention does not cross sequences.
        args: the model's shape under Megatron's names.
    """
    linear, quadratic = _flops_per_token(args), _attention_flops_per_squared_token(args)
    return sum(linear * s + quadratic * s * s for s in seqlens)


def _get(args: Namespace, name: str, default: int) -> int:
    value = getattr(args, name, None)
    return default if value is None else int(value)


def _head_dim(args: Namespace) -> int:
    return _get(args, "kv_channels", args.hidden_size // args.num_attention_heads)


def _flops_per_token(args: Namespace) -> float:
    """Everything that grows with s: projections, MLPs of all layers, the head."""
    vocab_size = _get(args, "padded_vocab_size", _get(args, "vocab_size", 0))
    num_moe = sum(is_moe_layer(args, layer) for layer in range(args.num_layers))
    mlp = _dense_mlp_flops(args) * (args.num_layers - num_moe) + (_moe_mlp_flops(args) * num_moe if num_moe else 0)
    return float(args.num_layers * _projection_flops(args) + mlp + 2 * args.hidden_size * vocab_size)


def _projection_flops(args: Namespace) -> float:
    """Queries, keys, values and output of one layer, per token."""
    h, heads = int(args.hidden_size), int(args.num_attention_heads)
    if not getattr(args, "multi_latent_attention", False):
        kv_heads = _get(args, "num_query_groups", heads)
        return (
            2 * h * heads * _head_dim(args) + 2 * 2 * h * kv_heads * _head_dim(args) + 2 * heads * _head_dim(args) * h
        )
    qk_dim = _get(args, "qk_head_dim", 128) + _get(args, "qk_pos_emb_head_dim", 64)
    v_dim = _get(args, "v_head_dim", 128)
    q_rank, kv_rank = _get(args, "q_lora_rank", 0), _get(args, "kv_lora_rank", 512)
    queries = 2 * (h * q_rank + q_rank * heads * qk_dim) if q_rank else 2 * h * heads * qk_dim
    latent = 2 * h * (kv_rank + _get(args, "qk_pos_emb_head_dim", 64))
    keys_values = 2 * kv_rank * heads * (_get(args, "qk_head_dim", 128) + v_dim)
    return queries + latent + keys_values + 2 * heads * v_dim * h


def _attention_flops_per_squared_token(args: Namespace) -> float:
    """QK and AV products of all layers, per s^2: heads x d each under a causal mask."""
    if getattr(args, "multi_latent_attention", False):
        qk_dim = _get(args, "qk_head_dim", 128) + _get(args, "qk_pos_emb_head_dim", 64)
        v_dim = _get(args, "v_head_dim", 128)
    else:
        qk_dim = v_dim = _head_dim(args)
    return float(args.num_layers * args.num_attention_heads * (qk_dim + v_dim))


def _dense_mlp_flops(args: Namespace) -> float:
    """Gate, up and down projections of one dense layer, per token."""
    return 6.0 * int(args.hidden_size) * _get(args, "ffn_hidden_size", 4 * args.hidden_size)


def _moe_mlp_flops(args: Namespace) -> float:
    """The same of one mixture-of-experts layer: the experts a token visits, and the shared ones."""
    expert = _get(args, "moe_ffn_hidden_size", _get(args, "ffn_hidden_size", 4 * args.hidden_size))
    width = expert * _get(args, "moe_router_topk", 1) + _get(args, "moe_shared_expert_intermediate_size", 0)
    return 6.0 * int(args.hidden_size) * width


def is_moe_layer(args: Namespace, layer: int) -> bool:
    """Whether a layer (from 0) has experts, by Megatron's `moe_layer_freq`: every n-th, or a list of 0 and 1."""
    if not _get(args, "num_experts", 0):
        return False
    frequency = getattr(args, "moe_layer_freq", 1)
    if isinstance(frequency, (list, tuple)):
        return bool(frequency[layer])
    return layer % int(frequency or 1) == 0
