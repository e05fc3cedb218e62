"""A decoder layer in as few calls as PyTorch allows, for the families whose layers are built like llama's.

It stands for a layer of transformers' model only if the layer has exactly the parts below, and only if the whole model
computes the same with it (`slime.backends.embedded.model` tries both at start-up); other layers stay as they are.

Letters: T tokens, Hq query heads, H key-value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slime.backends.embedded.attention import CachedAttention
from slime.backends.embedded.linear import FusedRMSNorm, StackedLinear

DECODER_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class FusedDecoderLayer(nn.Module):
    """x + attention(norm(x)), then that + mlp(norm(that)), with rotated heads and a SiLU gate.

    window: how many positions back this layer sees, None for all.
    """

    def __init__(self, layer: Any, attention: CachedAttention, index: int, window: int | None) -> None:
        super().__init__()
        self.layer = layer
        self._attention, self._index, self._window = attention, index, window
        attn, mlp = layer.self_attn, layer.mlp
        self._head_dim, self._scale = attn.head_dim, attn.scaling
        sizes = attn.q_proj.sizes
        self._num_query, self._num_key = sizes[0] // self._head_dim, sizes[1] // self._head_dim
        self._norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self._head_norms = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else None
        # In a tuple: looking up a module's parts takes longer than some of the calls below.
        self._products = tuple(part.product for part in (attn.q_proj, attn.o_proj, mlp.gate_proj, mlp.down_proj))
        self.gate_width: int = mlp.down_proj.in_features
        """Inputs of the MLP's last product."""

    def forward(self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """hidden_states [1, T, hidden] -> the same shape."""
        return self.compute(hidden_states[0], *self._attention.rotation(position_embeddings))[None]

    def compute(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, hidden], cos and the sine signed for swapped halves [T, 1, D] -> [T, hidden]."""
        num_tokens, num_query, num_key = x.shape[0], self._num_query, self._num_key
        norm_in, norm_mid = self._norms[0].forward, self._norms[1].forward  # without the hooks of a module call
        of_qkv, of_out, of_gate_up, of_down = self._products
        heads = of_qkv(norm_in(x)).view(num_tokens, -1, self._head_dim)
        if self._head_norms is None:
            rotated = _rotate(heads[:, : num_query + num_key], cos, sin)
            query, key = rotated[:, :num_query], rotated[:, num_query:]
        else:
            query = _rotate(self._head_norms[0](heads[:, :num_query]), cos, sin)
            key = _rotate(self._head_norms[1](heads[:, num_query : num_query + num_key]), cos, sin)
        attended = self._attention.attend(
            self._index,
            query.transpose(0, 1),
            key.transpose(0, 1),
            heads[:, num_query + num_key :].transpose(0, 1),
            self._scale,
            self._window,
        )
        x = x + of_out(attended.reshape(num_tokens, -1))
        return x + of_down(gated(of_gate_up(norm_mid(x))))


def gated(gate_up: Tensor) -> Tensor:
    """[T, 2 width], gate and up side by side -> silu(gate) * up [T, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class FusedPass:
    """From tokens to logits through fused layers, without the masks, caches and records of transformers' forward.

    It stands for that forward only if the whole model computes the same (tried at start-up, as the layers are).
    """

    def __init__(self, module: Any, attention: CachedAttention) -> None:
        decoder = module.get_decoder()
        self._embedding, self._norm = decoder.embed_tokens, decoder.norm
        self._decoder = decoder  # whose rotary embedding may be replaced
        self._layers: list[FusedDecoderLayer] = list(decoder.layers)
        self._head: StackedLinear = module.get_output_embeddings()
        self._attention = attention

    def logits(self, tokens: Tensor, positions: Tensor, keep: Tensor | None) -> Tensor:
        """tokens and positions [T], keep: which of the T, or None for all -> [len(keep), V]."""
        x = self._embedding(tokens)
        cos, sin = self._attention.rotation(self._decoder.rotary_emb(x[None], positions[None]))
        for layer in self._layers:
            x = layer.compute(x, cos, sin)
        return self._head.product(self._norm(x if keep is None else x[keep]))


def can_pass(module: Any) -> bool:
    """Whether a model with fused layers has exactly the parts of `FusedPass`."""
    parts = {name for name, _ in module.get_decoder().named_children()}
    head = module.get_output_embeddings()
    return parts == DECODER_PARTS and isinstance(head, StackedLinear) and len(head.sizes) == 1


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of whole heads: [T, heads, D] with cos and the sine signed for halves that were swapped."""
    return (heads * cos).add_(heads.roll(heads.shape[-1] // 2, -1).mul_(signed_sin))


def can_be_fused(layer: nn.Module) -> bool:
    """Whether a layer (its linear layers and norms already replaced) has exactly the parts of `FusedDecoderLayer`."""
    if {name for name, _ in layer.named_children()} != LAYER_PARTS:
        return False
    attn: Any = layer.self_attn
    mlp: Any = layer.mlp
    attention_parts = {name for name, _ in attn.named_children()}
    if attention_parts not in (ATTENTION_PARTS, ATTENTION_PARTS | HEAD_NORMS):
        return False
    if {name for name, _ in mlp.named_children()} != MLP_PARTS:
        return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if attention_parts & HEAD_NORMS:
        norms += [attn.q_norm, attn.k_norm]
        if attn.q_norm.weight.shape != (attn.head_dim,):
            return False
    stacks = [(attn.q_proj, 3), (attn.o_proj, 1), (mlp.gate_proj, 2), (mlp.down_proj, 1)]
    x = torch.linspace(-3, 3, 7)
    return (
        all(isinstance(norm, FusedRMSNorm) for norm in norms)
        and all(isinstance(linear, StackedLinear) and len(linear.sizes) == parts for linear, parts in stacks)
        and isinstance(getattr(attn, "scaling", None), float)
        and torch.equal(mlp.act_fn(x), F.silu(x))
    )
