"""Names and memory of the served weights: HuggingFace's names outside, stacked and packed matrices inside.

Every name leads to one or more places in the memory that computes (a tied embedding is a lookup table and a packed
head). Loading writes all places; reading and digests start from those places, never from a copy kept aside.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from slime.backends.embedded.linear import StackedLinear
from slime.weight_sync.digest import tensor_digest

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Names that old checkpoints carry and nobody needs."""


class WeightError(ValueError):
    """Weights that cannot be loaded or read as asked; nothing was changed."""


class Place(Protocol):
    """Where (a part of) one HuggingFace tensor lives."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def write(self, tensor: Tensor) -> None: ...

    def read(self) -> Tensor: ...

    def flush(self) -> None: ...


class ParameterMemory:
    """A parameter or buffer that the model reads as it is; it can be given back and allocated again."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.full_shape = parameter, tuple(parameter.shape)

    def tensor(self) -> Tensor:
        if self.parameter.numel() == 0:
            self.parameter.data = torch.empty(self.full_shape, dtype=self.parameter.dtype)
        return self.parameter.data

    def release(self) -> None:
        self.parameter.data = torch.empty(0, dtype=self.parameter.dtype)


class ParameterPlace:
    """A parameter, or a block of one (an expert of a 3-D parameter, one part of a stacked bias)."""

    def __init__(self, memory: ParameterMemory, index: tuple[int | slice, ...] = ()) -> None:
        self.memory, self.index = memory, index
        self.shape, self.dtype = tuple(memory.parameter.data[index].shape), memory.parameter.dtype

    def write(self, tensor: Tensor) -> None:
        self.memory.tensor()[self.index] = tensor

    def read(self) -> Tensor:
        return self.memory.tensor()[self.index]

    def flush(self) -> None:
        """Nothing to do: parameters are written where they compute."""


class RowsPlace:
    """One part of a stacked linear layer."""

    def __init__(self, linear: StackedLinear, part: int) -> None:
        self.linear, self.part = linear, part
        self.shape: tuple[int, ...] = (linear.sizes[part], linear.in_features)
        self.dtype = linear.matrix.dtype

    def write(self, tensor: Tensor) -> None:
        self.linear.matrix.write(self.linear.starts[self.part], tensor)

    def read(self) -> Tensor:
        return self.rows_of(self.linear.matrix.dense())

    def rows_of(self, dense: Tensor) -> Tensor:
        start = self.linear.starts[self.part]
        return dense[start : start + self.linear.sizes[self.part]]

    def flush(self) -> None:
        self.linear.matrix.flush()


@dataclass(frozen=True)
class TensorInfo:
    """What a sender says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class ServedWeights:
    """All weights of one engine, by HuggingFace name, in the order of the model's state dict."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.places: dict[str, list[Place]] = {}
        self.loaded: set[str] = set()
        self._parameters: list[ParameterMemory] = []
        self._linears: list[StackedLinear] = []

    # Built by slime.backends.embedded.model

    def add_linear(self, names: list[str], bias_names: list[str | None], linear: StackedLinear) -> None:
        """A stacked layer whose parts are the HuggingFace tensors `names` (and `bias_names`)."""
        self._linears.append(linear)
        for part, name in enumerate(names):
            self.places.setdefault(name, []).append(RowsPlace(linear, part))
        if linear.bias is not None:
            memory = self._memory(linear.bias)
            for start, size, bias in zip(linear.starts, linear.sizes, bias_names, strict=True):
                if bias is not None:
                    self.places.setdefault(bias, []).append(ParameterPlace(memory, (slice(start, start + size),)))

    def add_parameter(self, parts: dict[str, tuple[int | slice, ...]], parameter: Tensor) -> None:
        """A parameter or buffer the model reads as it is; `parts` says which block of it each HuggingFace name is."""
        memory = self._memory(parameter)
        for name, index in parts.items():
            self.places.setdefault(name, []).append(ParameterPlace(memory, index))

    def _memory(self, parameter: Tensor) -> ParameterMemory:
        self._parameters.append(ParameterMemory(parameter))
        return self._parameters[-1]

    # What is there

    def names(self) -> list[str]:
        """Every HuggingFace tensor that is served."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; raises `WeightError` for an unknown name."""
        self.check([name])
        return self.places[name][0].shape

    def missing(self) -> list[str]:
        """Names without values since the start or since the last `release`."""
        return [name for name in self.places if name not in self.loaded]

    def check(self, names: Iterable[str]) -> None:
        """Raise `WeightError` if one of `names` is not served."""
        unknown = [name for name in names if name not in self.places]
        if unknown:
            raise WeightError(
                f"The engine serves no tensor named {unknown[0]!r} ({len(unknown)} unknown names). "
                f"It serves {len(self.places)} tensors such as {next(iter(self.places))!r}; send HuggingFace names."
            )

    def check_infos(self, infos: Iterable[TensorInfo], *, same_dtype: bool) -> None:
        """Raise `WeightError` unless every announced tensor is served with this shape (and dtype)."""
        for info in infos:
            shape = self.shape(info.name)
            if tuple(info.shape) != shape:
                raise WeightError(f"{info.name} came as {list(info.shape)} but is served as {list(shape)}.")
            dtype = self.places[info.name][0].dtype
            if same_dtype and info.dtype != dtype:
                raise WeightError(f"{info.name} came as {info.dtype} but is served as {dtype}: cast it first.")

    # In and out

    def write(self, named: Iterable[tuple[str, Tensor]]) -> int:
        """Load tensors under their HuggingFace names, casting to the served dtype; returns how many.

        Parts of a packed matrix may come in different calls: a matrix that is served now is repacked with what came,
        one that was released is packed when its last part has come.
        """
        touched: dict[int, Place] = {}
        count = 0
        for name, tensor in named:
            for place in self.places[name]:
                place.write(tensor.to(place.dtype))
                touched[id(place.linear if isinstance(place, RowsPlace) else place)] = place
            self.loaded.add(name)
            count += 1
        for place in touched.values():
            place.flush()
        return count

    def read(self, name: str) -> Tensor:
        """One tensor, contiguous, out of the memory that computes; raises `WeightError` if it has none."""
        self.check([name])
        if name not in self.loaded:
            raise WeightError(f"{name} was released and not loaded again; load weights first.")
        return self.places[name][0].read().contiguous()

    def items(self) -> Iterator[tuple[str, list[Tensor]]]:
        """Each name with the content of all its places, unpacking every matrix once."""
        missing = self.missing()
        if missing:
            raise WeightError(f"{len(missing)} tensors such as {missing[0]} were released and not loaded again.")
        matrix: object = None
        dense = torch.empty(0)
        for name, places in self.places.items():
            contents = []
            for place in places:
                if isinstance(place, RowsPlace):
                    if place.linear.matrix is not matrix:
                        matrix, dense = place.linear.matrix, place.linear.matrix.dense()
                    contents.append(place.rows_of(dense).contiguous())
                else:
                    contents.append(place.read().contiguous())
            yield name, contents

    def digests(self) -> dict[str, str]:
        """xxh3-128 of the bytes of every tensor, read from the memory that computes.

        A tensor in several places has one digest if all places agree; otherwise the digests of all places, joined by
        `!=`, which equals no digest of anything.
        """
        return {name: "!=".join(sorted({tensor_digest(t) for t in contents})) for name, contents in self.items()}

    def release(self) -> None:
        """Give the memory of all weights back; nothing can be computed until every name was loaded again."""
        self.loaded.clear()
        for memory in self._parameters:
            memory.release()
        for linear in self._linears:
            linear.matrix.release()


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a HuggingFace folder; raises `WeightError` if it is not one."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [str(file) for file in files if not file.is_file()]
    if absent or not files:
        what = f"{absent[0]} is named in the index but absent" if absent else "no *.safetensors file"
        raise WeightError(f"Cannot load weights from {folder}: {what}. Give a folder in HuggingFace format.")
    return files


def load_folder(weights: ServedWeights, folder: str | Path, *, is_tied: bool) -> int:
    """Load a HuggingFace folder into `weights`; returns the number of tensors.

    Names and shapes are checked before anything is written, and no tensor may be missing.
    """
    from safetensors import safe_open

    found: dict[str, Path] = {}
    infos = []
    for file in checkpoint_files(folder):
        with safe_open(str(file), framework="pt") as reader:
            names = reader.keys()
            for name in names:
                if name.endswith(IGNORED_SUFFIXES) or (is_tied and name == "lm_head.weight"):
                    continue
                found[name] = file
                infos.append(TensorInfo(name, weights.dtype, tuple(reader.get_slice(name).get_shape())))
    weights.check_infos(infos, same_dtype=False)
    absent = [name for name in weights.names() if name not in found]
    if absent:
        raise WeightError(f"{folder} lacks {len(absent)} tensors of the served model, such as {absent[0]}.")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in sorted(set(found.values())):
            with safe_open(str(file), framework="pt") as reader:
                names = [name for name in reader.keys() if found.get(name) == file]  # noqa: SIM118 (not a dict)
                for name in names:
                    yield name, reader.get_tensor(name)

    return weights.write(tensors())
