"""Files of Megatron's distributed checkpoints (`torch_dist`): written from live memory or staged copies, read safely.

Writing is in three parts, so that the second can happen in the background: plan (collective), write, finish
(collective). Reading unpickles nothing but plain data and the few records that describe the files.
"""

import os
import pickle
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from slime.backends.megatron.staging import Staging

_FORMAT = CheckpointingConfig("torch_dist", 1)


class CheckpointWriter:
    """One checkpoint on its way to a folder, as one rank sees it."""

    def __init__(self, state: ShardedStateDict, folder: Path) -> None:
        """Plan what this rank writes, and write what all ranks have in common. Collective.

        Args:
            state: sharded tensors and, outside of them, plain data that is the same on every rank.
            folder: exists on all ranks.
        """
        self._folder = folder
        self._give_back: Callable[[], None] = lambda: None
        sharded, common = save_preprocess(state)
        if dist.get_rank() == 0:
            torch.save(common, folder / COMMON_STATE_FNAME)
        by_key, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        self._files = _Files(str(folder), thread_count=1)
        planner = megatron_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        (_, self._metadata, self._ranks), *_ = save_state_dict_async_plan(
            megatron_torch.mcore_to_pyt_state_dict(by_key), self._files, None, 0, planner=planner
        )
        if self._metadata is not None:
            del self._metadata.all_local_plans  # a cache for Megatron's own next save

    @property
    def size_bytes(self) -> int:
        """What this rank writes, without what describes it."""
        return sum(_num_bytes(data) for _, data in self._files.items)

    def stage(self, staging: Staging) -> None:
        """Copy what is to be written, so that training may go on while it is."""
        items = self._files.items
        copies, memory = staging.copies([data for _, data in items if isinstance(data, torch.Tensor)])
        rest = iter(copies)
        self._files.items = [(item, next(rest) if isinstance(data, torch.Tensor) else data) for item, data in items]
        if memory is not None:
            self._give_back = lambda: staging.give_back(memory)

    def write(self) -> None:
        """Write this rank's file and flush it. Speaks to no other rank: may run in another thread."""
        try:
            self._files.write()
        finally:
            self._give_back()

    def finish(self) -> None:
        """Write what describes the files, when all ranks have written. Collective."""
        save_state_dict_async_finalize(self._files, self._metadata, self._ranks)
        if dist.get_rank() == 0:
            save_config(_FORMAT, str(self._folder))


class _Files(FileSystemWriterAsync):
    """Keeps what the plan gives this rank to write; Megatron's would copy it all at once and fork writers."""

    items: list[tuple[WriteItem, Any]]

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.items = [(item, planner.resolve_data(item)) for item in plan.items]
        self._name = f"{plan.storage_data.prefix}0.distcp"
        self._results: list[WriteResult] = []

    def write(self) -> None:
        if not self.items:
            return
        with torch.no_grad(), open(Path(self.checkpoint_dir) / self._name, "wb") as stream:
            while self.items:  # what is written is let go
                item, data = self.items.pop(0)
                self._results.append(_written(stream, item, data, self._name, self.transforms))
            stream.flush()
            os.fsync(stream.fileno())

    def retrieve_write_results(self) -> list[WriteResult]:
        return self._results


def _written(stream: BinaryIO, item: WriteItem, data: Any, file_name: str, transforms: Any) -> WriteResult:
    if item.type != WriteItemType.BYTE_IO:
        data = data.detach().cpu()
        if data.untyped_storage().nbytes() != data.numel() * data.itemsize:
            data = data.clone()  # a view would be saved with all that it is a view of
    return _write_item(transforms, stream, data, item, file_name, serialization_format=SerializationFormat.TORCH_SAVE)


def _num_bytes(data: Any) -> int:
    return data.numel() * data.itemsize if isinstance(data, torch.Tensor) else len(data.getbuffer())


# --- reading ---------------------------------------------------------------------------------------------------------


class UnsafeCheckpointError(ValueError):
    """Reading a checkpoint would run code that is in it."""


def load_common(path: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What all ranks had in common: plain data.

    Raises:
        UnsafeCheckpointError: it holds other objects, and `allow_pickle` was not given.
    """
    try:
        common: dict[str, Any] = torch.load(
            path / COMMON_STATE_FNAME, map_location="cpu", weights_only=not allow_pickle
        )
    except pickle.UnpicklingError as error:
        raise _unsafe(path / COMMON_STATE_FNAME, error) from error
    return common


class CommonLoader(TorchCommonLoadStrategy):
    """Megatron's, with `load_common`."""

    def __init__(self, *, allow_pickle: bool = False) -> None:
        self._allow_pickle = allow_pickle

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return load_common(Path(checkpoint_dir), allow_pickle=self._allow_pickle)


class TensorLoader(megatron_torch.TorchDistLoadShardedStrategy):
    """Megatron's reader of sharded tensors, over a description of the files that is read safely."""

    def __init__(self, *, allow_pickle: bool = False) -> None:
        super().__init__()
        self._allow_pickle = allow_pickle

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> dict[str, Any]:
        tensors = list(megatron_torch.nested_values(sharded_state_dict))
        padded = {tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch}  # vocabulary
        original = sharded_state_dict
        by_key, flat, renamed = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        targets = megatron_torch.mcore_to_pyt_state_dict(by_key, is_loading=True)
        torch.distributed.checkpoint.load(
            targets,
            storage_reader=_Reader(checkpoint_dir, allow_pickle=self._allow_pickle),
            planner=megatron_torch.MCoreLoadPlanner(
                shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
                allow_shape_mismatch_sharded_tensors=padded,
            ),
        )
        found = {key: megatron_torch._unwrap_pyt_sharded_tensor(value) for key, value in targets.items()}
        loaded = megatron_torch._replace_sharded_keys_with_state_dict_keys(found, flat, renamed)
        megatron_torch._restore_dict_types(loaded, original)
        return loaded


def read_metadata(path: Path, *, allow_pickle: bool = False) -> Metadata:
    """The description of a checkpoint's tensors: names, shapes, and where in which file they lie.

    Raises:
        UnsafeCheckpointError: the file holds anything else, and `allow_pickle` was not given.
    """
    return _Reader(path, allow_pickle=allow_pickle).read_metadata()


class _Reader(CachedMetadataFileSystemReader):
    def __init__(self, path: str | Path, *, allow_pickle: bool) -> None:
        super().__init__(path)
        self._file = Path(path) / ".metadata"
        self._allow_pickle = allow_pickle

    def read_metadata(self) -> Metadata:
        if self._allow_pickle:
            return super().read_metadata()
        if self._cached_metadata is None:
            with open(self._file, "rb") as file:
                try:
                    metadata = _MetadataUnpickler(file).load()
                except (pickle.UnpicklingError, EOFError, AttributeError) as error:
                    raise _unsafe(self._file, error) from error
            if not isinstance(metadata, Metadata):
                raise _unsafe(self._file, TypeError(f"it is a {type(metadata).__name__}"))
            metadata.storage_meta = metadata.storage_meta or torch.distributed.checkpoint.metadata.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._cached_metadata = metadata
        return self._cached_metadata


_HARMLESS: dict[str, Sequence[str]] = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING", "TensorProperties"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": (
        "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "collections": ("OrderedDict",),
}  # fmt: skip
"""Records without behaviour, and what makes a layout or a shape of its name; beside them dtypes (`torch.float32`)."""


class _MetadataUnpickler(pickle.Unpickler):
    """Knows records that describe tensors and nothing else, so that a file cannot name anything that acts."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _HARMLESS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration, which Python 3.11.0 to 3.11.3 writes as `getattr` of its class and name."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it names builtins.getattr for {name!r} of {kind!r}")
    return kind[name]


def _unsafe(file: Path, error: Exception) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{file} holds more than plain data ({str(error).splitlines()[0]}): reading it could run code that someone put "
        "there. If you trust who made the checkpoint, give --allow-pickle-checkpoints."
    )
