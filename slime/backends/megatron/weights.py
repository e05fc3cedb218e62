"""The trainer's weights under HuggingFace names: loaded from a folder, and given out in buckets.

The table of the family is used in both directions; what is here is which rank holds which slice.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from slime.backends.megatron.model import global_parameters
from slime.backends.megatron.roll_call import RollCall
from slime.models.families import family_of
from slime.models.hf_folder import HfReader
from slime.models.shape import ModelShape, read_config
from slime.models.table import EMBEDDING, OUTPUT_LAYER, Family, Layout, shard, unshard


def load_hf_weights(models: Sequence[torch.nn.Module], path: str | Path) -> None:
    """Fill this rank's parameters from a HuggingFace folder.

    Raises:
        ValueError: tensors that are missing, left over or of another shape; the message names each.
    """
    config = read_config(path)
    family = family_of(config)
    shape, reader = family.shape_of(config), HfReader(path)
    _check_names(family, shape, reader)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in global_parameters(models):
            hf_names, layout = family.hf_names(name, shape), family.find(name)[1]
            whole_shape = list(parameter.shape)
            if layout.dim is not None:
                whole_shape[layout.dim] *= tp_size
            wanted = layout.hf_shapes(whole_shape, shape)
            for hf_name, hf_shape in zip(hf_names, wanted, strict=True):
                if reader.shape(hf_name) != hf_shape:
                    raise ValueError(
                        f"{hf_name} in {path} has the shape {reader.shape(hf_name)}, but the model that config.json "
                        f"describes needs {hf_shape} (for Megatron's {name})."
                    )
            whole = layout.join([reader.tensor(hf_name) for hf_name in hf_names], shape)
            parameter.copy_(_sliced(whole, whole_shape, layout, tp_rank, tp_size))


def _sliced(whole: Tensor, whole_shape: Sequence[int], layout: Layout, rank: int, size: int) -> Tensor:
    if whole.size(0) < whole_shape[0]:  # the vocabulary, whose padding no target ever names
        whole = torch.cat([whole, whole.new_zeros(whole_shape[0] - whole.size(0), *whole.shape[1:])])
    return shard(whole, layout, rank, size)


def _check_names(family: Family, shape: ModelShape, reader: HfReader) -> None:
    """Every tensor that the model has is in the folder, and the other way round."""
    expected = {hf_name for name in all_names(family, shape) for hf_name in family.hf_names(name, shape)}
    missing = sorted(expected - set(reader.names()))
    unknown = sorted(name for name in set(reader.names()) - expected if not family.is_ignored(name, shape))
    problems = []
    if missing:
        problems.append(f"the folder lacks {_listed(missing)}")
    if unknown:
        problems.append(f"the model has no place for {_listed(unknown)}")
    if problems:
        raise ValueError(
            f"{reader.path} is not the {family.model_type} model that its config.json describes: "
            + "; ".join(problems)
            + "."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def all_names(family: Family, shape: ModelShape) -> list[str]:
    """Megatron's global names of the whole model, in the order of the forward pass; a tied output layer is none."""
    layer = [entry.megatron for entry in family.entries if "{layer}" in entry.megatron]
    if not shape.has_qkv_bias:
        layer = [name for name in layer if not name.endswith("linear_qkv.bias")]
    if not shape.has_qk_norm:
        layer = [name for name in layer if not name.endswith(("q_layernorm.weight", "k_layernorm.weight"))]
    names = [EMBEDDING]
    names += [name.replace("{layer}", str(i)) for i in range(shape.num_layers) for name in layer]
    names.append("decoder.final_layernorm.weight")
    return names if shape.is_tied else [*names, OUTPUT_LAYER]


@dataclass(frozen=True)
class _Held:
    """What every rank knows of one tensor of the model."""

    stage: int
    """The first pipeline stage that holds it."""
    local_shape: tuple[int, ...]
    dtype: torch.dtype


class MegatronWeights:
    """A `WeightSource` over the live parameters: what it gives may be a view, valid until the next optimizer step.

    Building one is collective.
    """

    def __init__(
        self, models: Sequence[torch.nn.Module], family: Family, shape: ModelShape, roll_call: RollCall | None = None
    ) -> None:
        """With `roll_call`, an error of a rank that waited in vain names those that did not come."""
        self._models, self._family, self._shape = models, family, shape
        self._during = nullcontext if roll_call is None else roll_call.during
        self._order = all_names(family, shape)
        self._held = _who_holds_what(models)

    def names(self) -> list[str]:
        """HuggingFace names in the order of `buckets`."""
        return [hf_name for name in self._order for hf_name in self._family.find(name)[0]]

    @property
    def size_bytes(self) -> int:
        """Of all of them together."""
        return sum(sum(self._sizes(self._held[name], self._family.find(name)[1])) for name in self._order)

    @property
    def are_read_here(self) -> bool:
        """Whether `buckets` reads this rank's memory: that of the first data-parallel replica alone."""
        return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)

    def buckets(self, size_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """All weights in buckets of at most `size_bytes` (one larger tensor travels alone).

        Collective: every rank iterates to the end and sees as many buckets; on ranks other than 0 they are empty.
        """
        bucket: list[tuple[str, Tensor]] = []
        num_bytes = 0
        parameters = {name: parameter.detach() for name, parameter in global_parameters(self._models)}
        for name in self._order:
            hf_names, layout = self._family.find(name)
            sizes = self._sizes(self._held[name], layout)
            with self._during("gather the weights"):
                whole = self._gathered(parameters.get(name), self._held[name], layout)
            parts = [None] * len(hf_names) if whole is None else layout.split(whole, self._shape)
            for hf_name, part, size in zip(hf_names, parts, sizes, strict=True):
                if num_bytes and num_bytes + size > size_bytes:
                    yield bucket
                    bucket, num_bytes = [], 0
                num_bytes += size
                if part is not None:
                    bucket.append((hf_name, part.contiguous()))
        yield bucket

    def _sizes(self, held: _Held, layout: Layout) -> list[int]:
        """Bytes of each HuggingFace tensor."""
        whole = list(held.local_shape)
        if layout.dim is not None:
            whole[layout.dim] *= parallel_state.get_tensor_model_parallel_world_size()
        return [math.prod(hf_shape) * held.dtype.itemsize for hf_shape in layout.hf_shapes(whole, self._shape)]

    def _gathered(self, local: Tensor | None, held: _Held, layout: Layout) -> Tensor | None:
        """The whole tensor on rank 0 (None elsewhere), from the tensor-parallel ranks of the stage that has it."""
        if not self.are_read_here:
            return None
        stages = parallel_state.get_pipeline_model_parallel_group()
        whole = None
        if stages.rank() == held.stage:
            assert local is not None
            whole = _gathered_over_tensor_parallel(local, layout)
        if parallel_state.get_tensor_model_parallel_rank() != 0 or held.stage == 0:
            return whole if dist.get_rank() == 0 else None
        first, owner = dist.get_global_rank(stages, 0), dist.get_global_rank(stages, held.stage)
        if whole is not None:
            dist.send(whole.contiguous(), dst=first, group=stages)
        if stages.rank() != 0:
            return None
        whole_shape = list(held.local_shape)
        if layout.dim is not None:
            whole_shape[layout.dim] *= parallel_state.get_tensor_model_parallel_world_size()
        whole = torch.empty(whole_shape, dtype=held.dtype, device=torch.cuda.current_device())
        dist.recv(whole, src=owner, group=stages)
        return whole


def _gathered_over_tensor_parallel(local: Tensor, layout: Layout) -> Tensor | None:
    """The whole tensor on tensor-parallel rank 0."""
    group = parallel_state.get_tensor_model_parallel_group()
    if layout.dim is None or group.size() == 1:
        return local if group.rank() == 0 else None
    slices = [torch.empty_like(local) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(local.contiguous(), slices, dst=dist.get_global_rank(group, 0), group=group)
    return None if slices is None else unshard(slices, layout)


def _who_holds_what(models: Sequence[torch.nn.Module]) -> dict[str, _Held]:
    """Collective over pipeline stages."""
    stages = parallel_state.get_pipeline_model_parallel_group()
    mine = {
        name: _Held(stages.rank(), tuple(parameter.shape), parameter.dtype)
        for name, parameter in global_parameters(models)
    }
    everyones: list[dict[str, _Held]] = [mine] * stages.size()
    if stages.size() > 1:
        dist.all_gather_object(everyones, mine, group=stages)
    return {name: held for theirs in reversed(everyones) for name, held in theirs.items()}
