"""A sync gives all engines the new weights or fails loudly, and every way of losing a byte is caught."""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slime.weight_sync.base import Bucket, WeightSyncError
from slime.weight_sync.digest import TensorDigests, tensor_digest
from slime.weight_sync.proof import differences
from slime.weight_sync.sync import WeightSync
from slime.weight_sync.transports import (
    DiskTransport,
    SharedMemoryTransport,
    write_bucket,
)


def weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(7, 4, generator=generator).bfloat16(),
        "model.layer.weight": torch.randn(3, 5, generator=generator),
        "model.norm.weight": torch.randn(4, generator=generator).bfloat16(),
    }


class Source:
    """Weights in a dict, one bucket a tensor unless they fit."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def buckets(self, size_bytes: int) -> Iterator[Bucket]:
        bucket: Bucket = []
        for name, tensor in self.tensors.items():
            used = sum(t.numel() * t.element_size() for _, t in bucket)
            if bucket and used + tensor.numel() * tensor.element_size() > size_bytes:
                yield bucket
                bucket = []
            bucket.append((name, tensor))
        yield bucket


class FakeEngine:
    """Holds tensors the way an engine does: loads them from the shared file, digests what it holds."""

    def __init__(self, folder: Path, name: str = "engine 0") -> None:
        self.name, self.url, self.folder = name, "http://127.0.0.1:1", folder
        self.tensors = weights(seed=0)
        self.version, self.is_paused, self.calls = "default", False, []

    def pause(self, mode: str = "abort") -> None:
        self.calls.append(f"pause {mode}")
        self.is_paused = True

    def resume(self) -> None:
        self.calls.append("resume")
        self.is_paused = False

    def flush_cache(self, *, only_if_idle: bool = False) -> None:
        self.calls.append("flush if idle" if only_if_idle else "flush")

    def update_weights_from_shared_memory(self, manifest: dict[str, Any]) -> None:
        assert self.is_paused
        if manifest["file"] is not None:
            with open(self.folder / manifest["file"], "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for entry in manifest["tensors"]:
                like = self.tensors[entry["name"]]
                size = like.numel() * like.element_size()
                raw = bytearray(memory[entry["offset"] : entry["offset"] + size])
                self.tensors[entry["name"]] = torch.frombuffer(raw, dtype=like.dtype).view(like.shape)
        if manifest["last"]:
            self.version = manifest["weight_version"]

    def checksums(self) -> dict[str, str]:
        return {name: tensor_digest(tensor) for name, tensor in self.tensors.items()}

    def weight_version(self) -> str:
        return self.version


def make_sync(
    folder: Path, engines: Sequence[FakeEngine], transport: Any = None, size: int = 40, mode: str = "abort"
) -> WeightSync:
    sync = WeightSync(
        Source(weights(seed=1)),
        transport=transport or SharedMemoryTransport(folder),
        expected_digests=TensorDigests,
        bucket_size_bytes=size,
        pause_mode=mode,
    )
    sync.connect(engines)
    return sync


def test_a_cache_stays_only_where_frozen_requests_need_it(tmp_path: Path) -> None:
    for mode, flush in (("abort", "flush"), ("retract", "flush"), ("in_place", "flush if idle")):
        engine = FakeEngine(tmp_path)
        make_sync(tmp_path, [engine], mode=mode).sync(1)
        assert engine.calls == [f"pause {mode}", flush, "resume"]


def test_every_engine_holds_the_trainers_bytes_and_generates_again(
    tmp_path: Path,
) -> None:
    engines = [FakeEngine(tmp_path, "engine 0"), FakeEngine(tmp_path, "engine 1")]
    report = make_sync(tmp_path, engines).sync(1)
    for engine in engines:
        assert engine.calls == ["pause abort", "flush", "resume"]
        assert engine.version == "1"
        for name, tensor in weights(seed=1).items():
            torch.testing.assert_close(engine.tensors[name], tensor, rtol=0, atol=0)
    assert report.num_tensors == 3
    assert report.size_bytes == 7 * 4 * 2 + 3 * 5 * 4 + 4 * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [1, 64, 10**9])
def test_the_bucket_size_does_not_change_what_arrives(tmp_path: Path, size: int) -> None:
    engine = FakeEngine(tmp_path)
    make_sync(tmp_path, [engine], size=size).sync(3)
    assert engine.checksums() == {name: tensor_digest(tensor) for name, tensor in weights(seed=1).items()}


def test_a_byte_flipped_in_shared_memory_is_caught_and_named(tmp_path: Path) -> None:
    class Flipping(SharedMemoryTransport):
        """Flips a bit of the second tensor's file between the sender's digest and the engine's reading."""

        def send(self, bucket: Bucket, version: str) -> None:
            damaged = [(name, tensor.clone()) for name, tensor in bucket]
            for name, tensor in damaged:
                if name == "model.layer.weight":
                    tensor.view(torch.uint8)[0, 0] ^= 1
            super().send(damaged, version)

    engine = FakeEngine(tmp_path)
    with pytest.raises(WeightSyncError, match=r"engine 0 .*model\.layer\.weight") as error:
        make_sync(tmp_path, [engine], Flipping(tmp_path)).sync(1)
    assert "1 of 3 tensors differ" in str(error.value)
    assert engine.is_paused


def test_a_value_flipped_in_the_engine_is_caught_and_named(tmp_path: Path) -> None:
    class Decaying(FakeEngine):
        def update_weights_from_shared_memory(self, manifest: dict[str, Any]) -> None:
            super().update_weights_from_shared_memory(manifest)
            if manifest["last"]:
                self.tensors["model.norm.weight"][2] += 0.5

    engines = [FakeEngine(tmp_path, "engine 0"), Decaying(tmp_path, "engine 1")]
    with pytest.raises(WeightSyncError, match=r"engine 1 .*model\.norm\.weight"):
        make_sync(tmp_path, engines).sync(1)
    assert all(engine.is_paused for engine in engines), "version 1 must reach every engine or none"


def test_a_dropped_bucket_is_caught(tmp_path: Path) -> None:
    class Dropping(SharedMemoryTransport):
        def send(self, bucket: Bucket, version: str) -> None:
            if bucket[0][0] != "model.layer.weight":
                super().send(bucket, version)

    with pytest.raises(WeightSyncError, match=r"model\.layer\.weight"):
        make_sync(tmp_path, [FakeEngine(tmp_path)], Dropping(tmp_path)).sync(1)


def test_an_engine_that_only_reports_the_version_is_caught(tmp_path: Path) -> None:
    class Lying(FakeEngine):
        def update_weights_from_shared_memory(self, manifest: dict[str, Any]) -> None:
            self.version = manifest["weight_version"]

    with pytest.raises(WeightSyncError, match="3 of 3 tensors differ"):
        make_sync(tmp_path, [Lying(tmp_path)]).sync(1)


def test_an_engine_that_stays_at_the_old_version_is_caught(tmp_path: Path) -> None:
    class Stuck(FakeEngine):
        def weight_version(self) -> str:
            return "default"

    with pytest.raises(WeightSyncError, match="reports weight version 'default' after version '4'"):
        make_sync(tmp_path, [Stuck(tmp_path)]).sync(4)


def test_missing_and_unexpected_tensors_are_told_apart() -> None:
    problems = differences({"a": "1", "b": "2"}, {"b": "2", "c": "3"})
    assert problems == [
        "a is missing in the engine",
        "c is in the engine but was never sent",
    ]


def test_a_rank_that_is_not_the_sender_only_takes_part_in_the_gather() -> None:
    taken = []

    class Counting(Source):
        def buckets(self, size_bytes: int) -> Iterator[Bucket]:
            for _ in range(3):
                taken.append(size_bytes)
                yield []

    sync = WeightSync(
        Counting({}), transport=SharedMemoryTransport(Path()), expected_digests=TensorDigests,
        bucket_size_bytes=5, is_sender=False,
    )  # fmt: skip
    sync.connect([])
    assert sync.sync(1).size_bytes == 0
    assert taken == [5, 5, 5]


def test_a_bucket_that_does_not_fit_names_the_folder_and_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(WeightSyncError, match="--update-weight-buffer-size"):
        write_bucket(tmp_path / "b.bin", [("w", torch.zeros(4))])


def test_the_disk_transport_leaves_a_folder_that_can_be_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, target = tmp_path / "hf", tmp_path / "sync"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"old")
    seen: dict[str, Tensor] = {}

    class DiskEngine(FakeEngine):
        def update_weights_from_disk(self, path: str, version: str) -> None:
            files = sorted(Path(path).glob("*.safetensors"))
            assert (Path(path) / "config.json").exists()
            for file in files:
                seen.update(load_file(file))
            self.tensors, self.version = dict(seen), version

    transport = DiskTransport(target, model_path=str(model))
    make_sync(tmp_path, [DiskEngine(tmp_path)], transport).sync(2)
    assert set(seen) == set(weights(seed=1))
    assert not (target / "weight_v000002").exists()
