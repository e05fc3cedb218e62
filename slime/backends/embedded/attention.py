"""The attention layer that transformers' model code calls: writes keys and values into the cache, reads them back.

Letters: T tokens of the packed input, B sequences, Hq query heads, H key-value heads, D head size.
The model runs on one packed row [1, T]; a `Batch` object knows which token belongs to which sequence and attends.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slime.backends.embedded.cache import KVShape, SlotCache

NOT_SERVED = {"s_aux": "attention sinks", "softcap": "capped attention scores"}
"""Arguments of transformers' attention functions whose meaning this layer does not have."""


class Batch(Protocol):
    """One forward pass: which tokens go where."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Attention of all T tokens. query [Hq, T, D], key and value [H, T, D] -> [T, Hq, D]."""


_FLOAT_KEYS = 1 << 19
"""Keys that are widened to float32 at a time, so that they stay in the processor's cache."""
FEW_VALUES = 1 << 16
"""Up to here widening the values costs less than starting oneDNN's bf16 product."""
LONE_VALUES = 1 << 20
"""Up to here a lone sequence's keys are kept a second time."""
SEEN_STEP = 32
"""Decoding reads positions in multiples of this: oneDNN prepares a product for each new shape, which takes long."""


@dataclass
class DecodeBatch:
    """The next token of each of the first B rows of the cache.

    positions [B]: where that token stands in its sequence (the number of positions already cached).
    length: positions attended to, masked beyond each sequence's end; 0 for as many as the longest needs.
    """

    positions: Tensor
    length: int = 0
    _masks: dict[tuple[int | None, int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = torch.arange(self.positions.shape[0])
        self.length = self.length or (int(self.positions.max()) // SEEN_STEP + 1) * SEEN_STEP

    def mask(self, window: int | None, num_heads: int, group: int) -> Tensor:
        """[B * H, group, length] fp32, 0 where a sequence may look, minus infinity elsewhere."""
        key = (window, num_heads, group)
        if key not in self._masks:
            columns = torch.arange(self.length)
            hidden = columns > self.positions[:, None]
            if window is not None:
                hidden |= columns <= self.positions[:, None] - window
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self._masks[key] = mask[:, None, None].expand(-1, num_heads, group, -1).flatten(0, 1)
        return self._masks[key]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        assert cache is not None
        cache.store(layer, self.rows, self.positions, key, value)
        keys, values = cache.keys[layer], cache.values[layer]
        num_rows, num_heads, head_dim = self.rows.shape[0], key.shape[0], query.shape[-1]
        # The query heads of one key-value head become query positions, so keys and values are not repeated.
        grouped = query.transpose(0, 1).reshape(num_rows * num_heads, -1, head_dim)
        mask = self.mask(window, num_heads, grouped.shape[1])
        seen_keys = keys[:num_rows, ..., : self.length].flatten(0, 1)
        seen_values = values[:num_rows, :, : self.length].flatten(0, 1)
        return attend_grouped(grouped, seen_keys, seen_values, mask, scale).view(num_rows, query.shape[0], -1)


class LoneDecode:
    """Row 0 of the cache, running alone: no mask, no padding, as few calls as possible, step after step.

    Its keys are kept a second time, as [H, L, D]: so torch's fused attention, which is the fastest for one sequence,
    reads them as they lie.
    """

    def __init__(self, cache: SlotCache, position: int) -> None:
        """position: where the sequence's newest token stands."""
        self.position = position
        self._memory = cache.keys[0]
        self._keys = [keys[:1].mT.contiguous() for keys in cache.keys]
        self._cached = [(keys[0], values[:1]) for keys, values in zip(cache.keys, cache.values, strict=True)]

    def goes_on_to(self, position: int, cache: SlotCache) -> bool:
        """Whether the token at `position` is the next of this sequence, and the cache has not moved since.

        What other sequences did to row 0 in between is for the caller to know.
        """
        return position == self.position + 1 and bool(cache.keys) and cache.keys[0] is self._memory

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        keys, position = self._keys[layer], self.position
        cached_keys, values = self._cached[layer]
        cached_keys.narrow(2, position, 1).copy_(key.mT)
        keys.narrow(2, position, 1).copy_(key)
        values.narrow(2, position, 1).copy_(value)
        first = 0 if window is None else max(0, position + 1 - window)
        seen = position + 1 - first
        attended = F.scaled_dot_product_attention(
            query.view(1, key.shape[0], -1, query.shape[-1]),  # heads of one key-value head as query positions
            keys.narrow(2, first, seen),
            values.narrow(2, first, seen),
            scale=scale,
        )
        return attended.view(1, query.shape[0], -1)


class DecodeBatches:
    """The fastest way to attend for the next tokens of the running sequences, step after step."""

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._lone: LoneDecode | None = None

    def forget(self) -> None:
        """Row 0 may hold another sequence from now on."""
        self._lone = None

    def next(self, positions: list[int]) -> Batch:
        """positions: where the newest token of each of the first rows stands."""
        if len(positions) > 1 or (positions[0] + 1) * self._cache.widest > LONE_VALUES:
            self._lone = None
            return DecodeBatch(torch.tensor(positions))
        if self._lone is not None and self._lone.goes_on_to(positions[0], self._cache):
            self._lone.position = positions[0]
        else:
            self._lone = LoneDecode(self._cache, positions[0])
        return self._lone


def attend_grouped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, few_values: int = FEW_VALUES
) -> Tensor:
    """Softmax attention as two batched products: up to twice as fast here as torch's fused kernel, which computes one
    head at a time.

    Scores are float32: rounded to bf16 they would move log-probs three times as far from the trainer's.

    Args:
        query: [N, r, d].
        keys: [N, d, K].
        values: [N, K, d].
        mask: [N, r, K] fp32, additive.
        scale: multiplies the scores.
        few_values: elements of `values` up to which they are widened; 0 where the same N, r, d, K of more sequences
            must make the same bits.

    Returns:
        [N, r, d].
    """
    if query.dtype == torch.float32:
        return torch.bmm(torch.baddbmm(mask, query, keys, alpha=scale).softmax(-1), values)
    if values.numel() <= few_values:
        scores = torch.baddbmm(mask, query.float(), keys.float(), alpha=scale)
        return torch.bmm(scores.softmax(-1), values.float()).to(query.dtype)
    out = torch.empty_like(query)
    size = max(1, _FLOAT_KEYS // keys[0].numel())
    for start in range(0, query.shape[0], size):
        part = slice(start, start + size)
        scores = torch.baddbmm(mask[part], query[part].float(), keys[part].float(), alpha=scale)
        torch.bmm(scores.softmax(-1).to(query.dtype), values[part], out=out[part])
    return out


@dataclass(frozen=True)
class PrefillSegment:
    """New tokens of one prompt: `length` tokens from `start` in the packed row, after `cached` positions in `rows[0]`.

    All of `rows` get the same keys and values (requests with the same prompt); `rows[0]` holds the cached ones.
    """

    start: int
    length: int
    cached: int
    rows: tuple[int, ...]


@dataclass
class PrefillBatch:
    """Whole prompts, or what is left of them after a cached prefix; no sequence sees another."""

    segments: list[PrefillSegment]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        assert cache is not None
        keys, values = cache.keys[layer], cache.values[layer]
        out = torch.empty(query.shape[1], query.shape[0], value.shape[-1], dtype=query.dtype)
        for segment in self.segments:
            tokens = slice(segment.start, segment.start + segment.length)
            end = segment.cached + segment.length
            rows = list(segment.rows)
            keys[rows, :, :, segment.cached : end] = key[None, :, tokens].transpose(2, 3)
            values[rows, :, segment.cached : end] = value[None, :, tokens]
            if segment.cached:
                seen_keys = keys[rows[:1], :, :, :end].transpose(2, 3).contiguous()
                seen_values = values[rows[:1], :, :end]
            else:
                seen_keys, seen_values = key[None, :, tokens], value[None, :, tokens]
            mask = _prefill_mask(segment.length, end, window)
            attended = F.scaled_dot_product_attention(
                query[None, :, tokens],
                seen_keys,
                seen_values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=query.shape[0] != key.shape[0],
            )
            out[tokens] = attended[0].transpose(0, 1)
        return out


def _prefill_mask(length: int, end: int, window: int | None) -> Tensor | None:
    """[length, end] bool, true where the last `length` of `end` positions may look; None when plain causal says it."""
    if length == end and (window is None or end <= window):
        return None
    rows = torch.arange(end - length, end)[:, None]
    columns = torch.arange(end)
    visible = columns <= rows
    if window is not None:
        visible &= columns > rows - window
    return visible


class CachedAttention:
    """What is registered with transformers as an attention implementation; one object an engine.

    `ServedModel.logits` sets `batch` and `cache` for each forward pass. `calls` counts the layers that came through
    here, so that a model whose layers attend in another way is noticed at start-up.
    """

    def __init__(self) -> None:
        self.cache: SlotCache | None = None
        self.batch: Batch | None = None
        self.calls = 0
        self._embeddings: tuple[Tensor, Tensor] | None = None
        self._rotation: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [1, Hq, T, D], key and value [1, H, T, D] -> ([1, T, Hq, D], None), as transformers asks."""
        for name, meaning in NOT_SERVED.items():
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{type(module).__name__} uses {meaning} ({name}), which the embedded engine cannot compute. "
                    "Serve this model with --rollout-engine sglang."
                )
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        layer: int = module.layer_idx  # type: ignore[assignment]
        return self.attend(layer, query[0], key[0], value[0], scale, sliding_window)[None], None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [Hq, T, D], key and value [H, T, D] -> [T, Hq, D]."""
        assert self.batch is not None
        self.calls += 1
        return self.batch.attend(layer, query, key, value, self.cache, scale, window)

    def rotation(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """transformers' (cos, sin) [1, T, D] as (cos, sine signed for swapped halves) [T, 1, D]; once a pass."""
        if self._embeddings is not embeddings:
            cos, sin = embeddings[0][0, :, None], embeddings[1][0, :, None]
            half = sin.shape[-1] // 2
            self._rotation = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            self._embeddings = embeddings
        return self._rotation


@dataclass
class ShapeProbe:
    """One sequence, attended without a cache, writing down what each layer would keep and how far back it sees."""

    shapes: dict[int, KVShape] = field(default_factory=dict)
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: SlotCache | None,
        scale: float,
        window: int | None,
    ) -> Tensor:
        self.shapes[layer] = KVShape(key.shape[0], key.shape[-1], value.shape[-1])
        self.windows[layer] = window
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=query.shape[0] != key.shape[0]
        )
        return out[0].transpose(0, 1)
