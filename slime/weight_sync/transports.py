"""How buckets of weights travel to engines: shared memory on one host, or files on a disk that all hosts see."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from slime.models.hf_folder import WEIGHT_SUFFIXES
from slime.utils.run_marker import folder_prefix
from slime.weight_sync.base import Bucket, WeightEngine, WeightSyncError
from slime.weight_sync.digest import raw_bytes
from slime.weight_sync.sync import SenderTransport, on_each

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes; a tensor starts on a cache line, which every dtype accepts


def shared_memory_folder(preferred: str | None = None) -> Path:
    """A new private folder (mode 0700) for handing over weights, in memory where the host has /dev/shm."""
    parent = preferred or ("/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else None)
    return Path(tempfile.mkdtemp(prefix=folder_prefix("weights"), dir=parent))


class SharedMemoryTransport(SenderTransport):
    """Buckets as files in memory that trainer and engines on one host both map.

    A bucket is written once and read by every engine; its file is removed as soon as all have it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: Sequence[WeightEngine] = ()
        self._count = 0

    def connect(self, engines: Sequence[WeightEngine]) -> None:
        self._engines = engines

    def send(self, bucket: Bucket, version: str) -> None:
        self._deliver(bucket, version, is_last=False)

    def finish(self, version: str) -> None:
        self._deliver([], version, is_last=True)
        self._count = 0

    def _deliver(self, bucket: Bucket, version: str, *, is_last: bool) -> None:
        path = self._folder / f"v{version}-b{self._count:04d}.bin"
        self._count += 1
        try:
            tensors = write_bucket(path, bucket)
            manifest = {"file": path.name, "tensors": tensors, "weight_version": version, "last": is_last}
            on_each(self._engines, lambda engine: engine.update_weights_from_shared_memory(manifest))
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def write_bucket(path: Path, bucket: Bucket) -> list[dict[str, object]]:
    """Lay a bucket's tensors one after another in a new file; returns name, dtype, shape and byte offset of each.

    Raises:
        WeightSyncError: the folder has no room for the bucket.
    """
    layout, offset = [], 0
    for name, tensor in bucket:
        layout.append(
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offset": offset,
            }
        )
        offset += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Written and not mapped: no page faults, and a full tmpfs is an exception, not a SIGBUS.
        os.ftruncate(descriptor, max(offset, 1))
        for entry, (_, tensor) in zip(layout, bucket, strict=True):
            _write_at(descriptor, raw_bytes(tensor), entry["offset"])
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise WeightSyncError(
            f"A bucket of {offset / 1e6:.0f} MB does not fit in {path.parent} ({free / 1e6:.0f} MB free): {error}. "
            "Give it less at a time with --update-weight-buffer-size BYTES, or enlarge the host's shared memory."
        ) from error
    finally:
        os.close(descriptor)
    return layout


def _write_at(descriptor: int, source: torch.Tensor, offset: int) -> None:
    """Write all of a [bytes] uint8 tensor; one call of the system may take less."""
    left = memoryview(source.numpy())
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count


class DiskTransport(SenderTransport):
    """A HuggingFace folder a version, `weight_v000012`, which the engines load themselves."""

    def __init__(self, folder: Path, *, model_path: str, keep_files: bool = False) -> None:
        """
        Args:
            folder: seen under the same path by trainer and engines (--update-weight-disk-dir).
            model_path: HuggingFace folder whose configuration and tokenizer files accompany the weights.
            keep_files: leave every version on disk.
        """
        self._folder, self._model_path, self._keep_files = (
            folder,
            Path(model_path),
            keep_files,
        )
        self._engines: Sequence[WeightEngine] = ()
        self._weight_map: dict[str, str] = {}
        self._num_files = 0
        self._size_bytes = 0

    def connect(self, engines: Sequence[WeightEngine]) -> None:
        self._engines = engines
        self._num_files, self._size_bytes, self._weight_map = 0, 0, {}  # what a sync that failed left

    def send(self, bucket: Bucket, version: str) -> None:
        folder = self._version_folder(version)
        if self._num_files == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        self._num_files += 1
        file = f"model-{self._num_files:05d}.safetensors"
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in bucket},
                folder / file,
            )
        except OSError as error:
            free = shutil.disk_usage(folder).free
            raise WeightSyncError(
                f"Writing weights to {folder} failed with {free / 1e6:.0f} MB free: {error}. "
                "Point --update-weight-disk-dir at a disk with room for two copies of the model."
            ) from error
        self._weight_map |= {name: file for name, _ in bucket}
        self._size_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)

    def finish(self, version: str) -> None:
        folder = self._version_folder(version)
        index = {
            "metadata": {"total_size": self._size_bytes},
            "weight_map": self._weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        copy_model_files(self._model_path, folder)
        self._weight_map, self._num_files, self._size_bytes = {}, 0, 0
        try:
            on_each(
                self._engines,
                lambda engine: engine.update_weights_from_disk(str(folder), version),
            )
        finally:
            if not self._keep_files:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Nothing is held open."""

    def _version_folder(self, version: str) -> Path:
        return self._folder / f"weight_v{int(version):06d}"


def copy_model_files(model_path: Path, folder: Path) -> None:
    """Copy what is not a weight (configuration, tokenizer, chat template) from one HuggingFace folder to another."""
    for file in model_path.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copy2(file, folder / file.name)
