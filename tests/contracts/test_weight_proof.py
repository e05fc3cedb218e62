"""Four ways of losing weights between a trainer and a real embedded engine; each is caught before a token is made."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import load_file
from torch import Tensor

from slime.backends.embedded.engine import Engine, EngineSettings
from slime.backends.embedded.frontend import Frontend
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.server import build_parser, create_app, end_tokens_of
from slime.backends.embedded.text import load_codec
from slime.backends.sglang.client import SGLangClient
from slime.weight_sync.base import Bucket, WeightSyncError
from slime.weight_sync.digest import TensorDigests
from slime.weight_sync.sync import WeightSync
from slime.weight_sync.transports import SharedMemoryTransport
from tests.contracts.engine.tiny_model import save_tiny_model

VICTIM = "model.layers.1.mlp.up_proj.weight"


class ServedEngine:
    """A real engine and its server in a thread of this process, so that a test can reach its memory."""

    def __init__(self, folder: Path, weights_dir: Path, dtype: torch.dtype) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["--model-path", str(folder), "--port", str(port), "--weights-dir", str(weights_dir)]
        arguments = build_parser().parse_args(words)
        model, codec = ServedModel(folder, dtype), load_codec(str(folder))
        self.engine = Engine(model, EngineSettings(max_running_requests=4, context_length=128))
        frontend = Frontend(self.engine, codec, end_tokens_of(str(folder), model.config, codec))
        self.engine.start()
        config = uvicorn.Config(create_app(frontend, arguments), port=port, log_level="warning", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        self.client = SGLangClient(f"http://127.0.0.1:{port}", name="engine 0", timeout_s=30)
        deadline = time.monotonic() + 30
        while not self.client.health():
            assert time.monotonic() < deadline, "the engine did not start"
            time.sleep(0.05)

    def generate(self, timeout_s: float = 30) -> dict[str, Any]:
        request = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
        reply = httpx.post(f"{self.client.url}/generate", json=request, timeout=timeout_s)
        return dict(reply.raise_for_status().json())

    def generates_nothing(self) -> bool:
        """Whether a request is still without an answer after a second."""
        try:
            self.generate(timeout_s=1)
        except httpx.ReadTimeout:
            return True
        return False

    def close(self) -> None:
        self.client.resume()
        self.server.should_exit = True
        self.thread.join(10)
        self.engine.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("proof") / "llama")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def served(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Iterator[ServedEngine]:
    torch.set_num_threads(1)
    engine = ServedEngine(folder, tmp_path, request.param)
    yield engine
    engine.close()


class Trained:
    """The checkpoint's weights, moved a little: what a trainer has after a step."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tensors: dict[str, Tensor] = {
            name: (tensor * 1.5).to(dtype) for name, tensor in sorted(load_file(folder / "model.safetensors").items())
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def buckets(self, size_bytes: int) -> Iterator[Bucket]:
        names = self.names()
        for start in range(0, len(names), 4):
            yield [(name, self.tensors[name]) for name in names[start : start + 4]]


def sync_with(served: ServedEngine, folder: Path, transport: SharedMemoryTransport, client: Any = None) -> WeightSync:
    dtype = served.engine.model.dtype
    sync = WeightSync(
        Trained(folder, dtype), transport=transport, expected_digests=TensorDigests, bucket_size_bytes=1 << 20
    )
    sync.connect([client or served.client])
    return sync


def test_proved_weights_are_served_under_their_version(served: ServedEngine, folder: Path, tmp_path: Path) -> None:
    before = served.generate()
    sync_with(served, folder, SharedMemoryTransport(tmp_path)).sync(1)
    after = served.generate()
    assert before["meta_info"]["weight_version"] != after["meta_info"]["weight_version"] == "1"
    for name, tensor in Trained(folder, served.engine.model.dtype).tensors.items():
        torch.testing.assert_close(served.engine.weights.read(name), tensor, rtol=0, atol=0)


def test_a_byte_flipped_in_the_shared_file(
    served: ServedEngine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slime.weight_sync import transports

    write_bucket = transports.write_bucket

    def write_and_flip(path: Path, bucket: Bucket) -> list[dict[str, Any]]:
        layout = write_bucket(path, bucket)
        for entry in layout:
            if entry["name"] == VICTIM:
                with path.open("r+b") as file:
                    file.seek(int(entry["offset"]) + 5)
                    byte = file.read(1)[0]
                    file.seek(-1, 1)
                    file.write(bytes([byte ^ 0x10]))
        return layout

    monkeypatch.setattr(transports, "write_bucket", write_and_flip)
    with pytest.raises(WeightSyncError, match=rf"engine 0 .*{VICTIM}") as error:
        sync_with(served, folder, SharedMemoryTransport(tmp_path)).sync(1)
    assert "1 of" in str(error.value)
    assert served.generates_nothing()


def test_a_value_flipped_in_the_memory_that_computes(served: ServedEngine, folder: Path, tmp_path: Path) -> None:
    """Flipped after everything was loaded, in the packed matrix itself where the engine packs."""

    class ThenFlip(SharedMemoryTransport):
        def finish(self, version: str) -> None:
            super().finish(version)
            served.engine.call(flip).result()

    def flip() -> None:
        weights = served.engine.weights
        damaged = weights.read(VICTIM).clone()
        damaged[3, 2] += 1.0
        weights.write([(VICTIM, damaged)])

    with pytest.raises(WeightSyncError, match=rf"engine 0 .*{VICTIM}"):
        sync_with(served, folder, ThenFlip(tmp_path)).sync(1)
    assert served.generates_nothing()


def test_a_dropped_bucket(served: ServedEngine, folder: Path, tmp_path: Path) -> None:
    class Dropping(SharedMemoryTransport):
        def send(self, bucket: Bucket, version: str) -> None:
            if VICTIM not in dict(bucket):
                super().send(bucket, version)

    with pytest.raises(WeightSyncError, match=VICTIM):
        sync_with(served, folder, Dropping(tmp_path)).sync(1)
    assert served.generates_nothing()


def test_an_engine_that_claims_a_version_it_never_loaded(served: ServedEngine, folder: Path, tmp_path: Path) -> None:
    class Claiming(SharedMemoryTransport):
        def send(self, bucket: Bucket, version: str) -> None: ...

        def finish(self, version: str) -> None:
            served.client.set_weight_version(version)

    with pytest.raises(WeightSyncError, match=r"engine 0 .*does not hold version 1"):
        sync_with(served, folder, Claiming(tmp_path)).sync(1)
    assert served.generates_nothing()
