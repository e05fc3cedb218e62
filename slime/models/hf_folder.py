"""HuggingFace checkpoint folders: reads tensors one at a time, writes whole folders that appear only when complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".safetensors.index.json", ".bin.index.json",
)  # fmt: skip
"""Ends of the file names that hold weights; all else in a HuggingFace folder describes the model or its tokenizer."""
_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


class HfReader:
    """The tensors of a folder's safetensors files, read when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of: dict[str, Path] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in self._file_of:
                        raise ValueError(f"{name} is in {self._file_of[name].name} and in {file.name} of {path}.")
                    self._file_of[name] = file
        if not self._file_of:
            raise FileNotFoundError(
                f"{path} holds no .safetensors file. Other formats are not read: "
                "load the model with transformers and call save_pretrained."
            )

    def names(self) -> list[str]:
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._file(name), "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        with safe_open(self._file(name), "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def _file(self, name: str) -> Path:
        if name not in self._file_of:
            raise KeyError(f"{self.path} has no tensor {name!r}.")
        return self._file_of[name]


def save_hf_folder(
    path: str | Path,
    origin: str | Path,
    buckets: Iterable[Iterable[tuple[str, Tensor]]],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint that transformers and engines load.

    Everything is written beside `path` first and renamed at the end, so a folder of that name is always whole.

    Args:
        path: the folder to make; one that is there is replaced.
        origin: the folder whose other files (config, tokenizer, chat template) are copied.
        buckets: names and tensors, as a weight source gives them.
        shard_bytes: a file is closed when it has reached this size.

    Raises:
        ValueError: `path` is `origin`, or a name comes twice.
    """
    path, origin = Path(path).absolute(), Path(origin).absolute()
    if path.resolve() == origin.resolve():
        raise ValueError(f"Saving to {path} would overwrite the checkpoint that the run started from: choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        dtypes = _write_weights(unfinished, buckets, shard_bytes)
        _copy_other_files(origin, unfinished, dtypes)
        _replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_weights(folder: Path, buckets: Iterable[Iterable[tuple[str, Tensor]]], shard_bytes: int) -> set[torch.dtype]:
    """Shards and index; returns the dtypes that were written."""
    shards: list[list[str]] = []
    open_shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    dtypes: set[torch.dtype] = set()
    open_bytes = total_bytes = 0

    def close_shard() -> None:
        save_file(open_shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(open_shard))

    for name, tensor in (pair for bucket in buckets for pair in bucket):
        if name in seen:
            raise ValueError(f"The tensor {name!r} comes twice; a checkpoint has one of each name.")
        size = tensor.numel() * tensor.element_size()
        if open_shard and open_bytes + size > shard_bytes:
            close_shard()
            open_shard, open_bytes = {}, 0
        open_shard[name] = tensor.detach().to("cpu").contiguous().clone()  # safetensors refuses views of one storage
        seen.add(name)
        dtypes.add(tensor.dtype)
        open_bytes += size
        total_bytes += size
    close_shard()

    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{i}", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return dtypes


def _copy_other_files(origin: Path, folder: Path, dtypes: set[torch.dtype]) -> None:
    for file in sorted(origin.iterdir()):
        if file.name.startswith(".") or file.name.endswith(WEIGHT_SUFFIXES):
            continue
        if file.is_dir():
            shutil.copytree(file, folder / file.name)
        elif file.name == "config.json":
            config = _with_dtype(json.loads(file.read_text()), dtypes)
            (folder / file.name).write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(file, folder / file.name)


def _with_dtype(config: Mapping[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json names the dtype to load in; where weights are saved in another, loading must not round them."""
    if len(dtypes) != 1:
        return dict(config)
    name = _DTYPE_NAMES[next(iter(dtypes))]
    return {key: name if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def _replace(unfinished: Path, path: Path) -> None:
    """Rename, keeping an older folder of that name until the new one is in its place."""
    unfinished.chmod(0o755)
    if not path.exists():
        unfinished.rename(path)
        return
    outdated = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(outdated / "folder")
    unfinished.rename(path)
    shutil.rmtree(outdated)
