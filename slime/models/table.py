"""How one tensor of Megatron is made of tensors of HuggingFace and back, whole or sliced: arithmetic on shapes.

A family is a table of entries; `Family` answers for any of Megatron's global names which HuggingFace tensors it holds.
"Global" means that layers are counted over the whole model and that the tensor is not sliced.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from slime.models.shape import ModelShape


class Layout(Protocol):
    """How HuggingFace tensors lie in one tensor of Megatron."""

    @property
    def dim(self) -> int | None:
        """The dimension that tensor parallelism slices; None: every rank holds the whole."""

    @property
    def stride(self) -> int:
        """Parts along `dim` that are each sliced for themselves."""

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        """HuggingFace's tensors to Megatron's."""

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        """Megatron's tensor to HuggingFace's."""

    def hf_shapes(self, whole: Sequence[int], shape: ModelShape) -> list[tuple[int, ...]]:
        """The shapes that `join` needs to make a tensor of shape `whole`."""


@dataclass(frozen=True)
class Same:
    """One tensor under two names."""

    dim: int | None = None
    stride: int = 1

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return [whole]

    def hf_shapes(self, whole: Sequence[int], shape: ModelShape) -> list[tuple[int, ...]]:
        return [tuple(whole)]


@dataclass(frozen=True)
class Stacked:
    """Tensors of equal shape one under the other: [gate; up]. Each is sliced for itself."""

    dim: int | None = 0
    stride: int = 2

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return list(whole.chunk(self.stride))

    def hf_shapes(self, whole: Sequence[int], shape: ModelShape) -> list[tuple[int, ...]]:
        return [(whole[0] // self.stride, *whole[1:])] * self.stride


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value interleaved by group: [q heads of group 0, k 0, v 0, q heads of group 1, ...]."""

    dim: int | None = 0
    stride: int = 1

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        by_group = [part.view(shape.num_query_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_group, 1).flatten(0, 1)

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        heads = shape.num_attention_heads // shape.num_query_groups
        by_group = whole.view(shape.num_query_groups, (heads + 2) * shape.head_dim, *whole.shape[1:])
        parts = torch.split(by_group, [heads * shape.head_dim, shape.head_dim, shape.head_dim], 1)
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    def hf_shapes(self, whole: Sequence[int], shape: ModelShape) -> list[tuple[int, ...]]:
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
        return [(rows, *whole[1:]) for rows in (queries, keys, keys)]


@dataclass(frozen=True)
class Vocabulary:
    """One row an id; Megatron's has zero rows after the last id so that the ranks' slices are equal."""

    dim: int | None = 0
    stride: int = 1

    def join(self, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return [whole[: shape.vocab_size]]

    def hf_shapes(self, whole: Sequence[int], shape: ModelShape) -> list[tuple[int, ...]]:
        return [(shape.vocab_size, *whole[1:])]


def shard(whole: Tensor, layout: Layout, rank: int, size: int) -> Tensor:
    """The slice of tensor-parallel rank `rank` of `size`."""
    if layout.dim is None or size == 1:
        return whole
    chunks = whole.chunk(size * layout.stride, layout.dim)
    return torch.cat(chunks[rank::size], layout.dim)


def unshard(slices: Sequence[Tensor], layout: Layout) -> Tensor:
    """The whole from the slices of all ranks, in the order of the ranks."""
    if layout.dim is None or len(slices) == 1:
        return slices[0]
    parts = [piece.chunk(layout.stride, layout.dim) for piece in slices]
    return torch.cat([part[i] for i in range(layout.stride) for part in parts], layout.dim)


@dataclass(frozen=True)
class Entry:
    """One kind of tensor.

    Attributes:
        megatron: its name in Megatron; `{layer}` stands for the number of the layer.
        hf: the names in HuggingFace, in the order in which `layout` joins them.
        layout: see there.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Family:
    """Models that share their names and settings.

    Attributes:
        model_type: `model_type` in config.json.
        entries: the tensors of a model of this family, the optional ones (biases, norms of heads) too.
        shape_of: config.json to the model's shape.
        ignored: patterns of HuggingFace names that hold no weights of their own.
    """

    model_type: str
    entries: tuple[Entry, ...]
    shape_of: Callable[[Mapping[str, Any]], ModelShape]
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [
            (re.compile(re.escape(entry.megatron).replace(r"\{layer\}", r"(?P<layer>\d+)")), entry)
            for entry in self.entries
        ]

    def find(self, megatron_name: str) -> tuple[tuple[str, ...], Layout]:
        """HuggingFace's names of a global Megatron name, and how they lie in it."""
        for pattern, entry in self._patterns:
            if match := pattern.fullmatch(megatron_name):
                return tuple(name.format(**match.groupdict()) for name in entry.hf), entry.layout
        raise KeyError(
            f"Megatron's tensor {megatron_name!r} is not in the table of {self.model_type!r} "
            f"(slime/models/{self.model_type}.py), so it can neither be loaded nor exported."
        )

    def hf_names(self, megatron_name: str, shape: ModelShape) -> tuple[str, ...]:
        """As `find`, with a tied output layer under the name of the embedding that it shares."""
        if shape.is_tied and megatron_name == OUTPUT_LAYER:
            megatron_name = EMBEDDING
        return self.find(megatron_name)[0]

    def is_ignored(self, hf_name: str, shape: ModelShape) -> bool:
        """Whether a checkpoint may hold this name without anybody reading it."""
        if shape.is_tied and hf_name in self.find(OUTPUT_LAYER)[0]:
            return True
        return any(re.fullmatch(pattern, hf_name) for pattern in self.ignored)


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
