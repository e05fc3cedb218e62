"""How the tokens of a step go through the model and become the next tokens; the engine has one `Passes` object."""

from typing import Protocol

import torch
from torch import Tensor

from slime.backends.embedded.attention import DecodeBatches, PrefillBatch, PrefillSegment
from slime.backends.embedded.cache import SlotCache
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.sampling import Sampled, Sampler, SamplingRow


class Passes(Protocol):
    """Letters: T packed tokens, B sequences, V vocabulary."""

    def prefill(
        self, tokens: list[int], positions: list[int], keep: list[int], segments: list[PrefillSegment]
    ) -> Tensor:
        """Compute and store T prompt tokens; returns the logits [len(keep), V] of those at the indices `keep`."""

    def decode(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Compute and store the newest token of the first B rows of the cache; returns logits [B, V]."""

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> list[Sampled]:
        """One token a row of logits [B, V]."""


class FastPasses:
    """All sequences together; the last bits of a reply depend on what else runs."""

    def __init__(self, model: ServedModel, cache: SlotCache, sampler: Sampler) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self._decode_batches = DecodeBatches(cache)

    def prefill(
        self, tokens: list[int], positions: list[int], keep: list[int], segments: list[PrefillSegment]
    ) -> Tensor:
        self._decode_batches.forget()
        return self.model.logits(tokens, positions, torch.tensor(keep), PrefillBatch(segments), self.cache)

    def decode(self, tokens: list[int], positions: list[int]) -> Tensor:
        return self.model.logits(tokens, positions, None, self._decode_batches.next(positions), self.cache)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> list[Sampled]:
        return self.sampler.sample(logits, rows)
