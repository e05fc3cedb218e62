"""slime's own weight sync against a live engine: digests foretold, weights carried and proved, faults caught."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slime.backends.sglang.checksum import FusedTensorDigests, algorithm_of
from slime.backends.sglang.client import SGLangClient
from slime.utils.processes import free_port
from slime.weight_sync.base import WeightSyncError
from slime.weight_sync.digest import ExpectedDigests, TensorDigests
from slime.weight_sync.ipc import IpcTransport
from slime.weight_sync.process_group import DistributedTransport
from slime.weight_sync.sync import Transport, WeightSync
from slime.weight_sync.transports import SharedMemoryTransport
from tests.contracts.engine.conftest import HEADS_FOR_GPUS, Stock
from tests.contracts.engine.speaking import Engine, Reference
from tests.contracts.engine.tiny_model import save_tiny_model


def tensors_of(model_path: str) -> dict[str, Tensor]:
    return {name: tensor for file in Path(model_path).glob("*.safetensors") for name, tensor in load_file(file).items()}


def expected_digests(engine: Engine) -> ExpectedDigests:
    if engine.kind == "embedded":
        return TensorDigests()
    model_type = json.loads((Path(engine.model_path) / "config.json").read_text())["model_type"]
    return FusedTensorDigests(model_type, algorithm=algorithm_of(engine.info["device"]))


@pytest.fixture(autouse=True)
def our_engines_only(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames and request.getfixturevalue("engine").kind == "url":
        pytest.skip("what an engine at a URL reports, and how weights reach it, is not known")


@pytest.fixture(autouse=True)
def engines_with_digests_only(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").needs_digests()


def test_the_digests_of_loaded_weights_are_foretold_from_the_checkpoint(engine: Engine):
    digests = expected_digests(engine)
    digests.add(tensors_of(engine.model_path).items())
    assert engine.checksums() == digests.result()


class Weights:
    """A trainer's weights: the checkpoint, scaled where a test says so, in buckets of four tensors."""

    def __init__(self, model_path: str, device: str) -> None:
        self.tensors = {name: tensor.to(device) for name, tensor in tensors_of(model_path).items()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def buckets(self, size_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        items = list(self.tensors.items())
        for start in range(0, len(items), 4):
            yield items[start : start + 4]


@pytest.fixture
def weights(engine: Engine) -> Weights:
    return Weights(engine.model_path, "cuda" if engine.info["device"] == "cuda" else "cpu")


@pytest.fixture(params=["its own", "ipc"])
def transport(engine: Engine, request: pytest.FixtureRequest) -> Transport:
    if engine.kind == "embedded":
        if request.param == "ipc":
            pytest.skip("the embedded engine reads files in memory")
        assert engine.weights_dir is not None
        engine.weights_dir.mkdir(mode=0o700, exist_ok=True)
        return SharedMemoryTransport(engine.weights_dir)
    if request.param == "ipc":  # without a GPU a handle carries the bytes
        is_on_gpu = engine.info["device"] == "cuda"
        return IpcTransport(lambda engine: [0], share=None if is_on_gpu else lambda buffer, _: buffer.__reduce_ex__(2))
    return DistributedTransport(backend="gloo", master_address="127.0.0.1", free_port=free_port, timeout_s=60)


@pytest.fixture
def sync(engine: Engine, weights: Weights, transport: Transport) -> Iterator[WeightSync]:
    """A connected sync; the engine's own weights and version are put back after the test."""
    version, client = engine.weight_version(), SGLangClient(engine.url, name="engine 0", timeout_s=60)
    sync = WeightSync(
        weights, transport=transport, expected_digests=lambda: expected_digests(engine), bucket_size_bytes=1 << 20
    )
    sync.connect([client])
    yield sync
    sync.close()
    client.resume()
    client.update_weights_from_disk(engine.model_path, version)
    client.close()


def test_new_weights_are_carried_proved_and_used(
    engine: Engine, weights: Weights, sync: WeightSync, reference: Reference
):
    prompt = reference.encode("The answer is")
    before = engine.greedy(prompt, 8)["output_ids"]
    original = weights.tensors["model.norm.weight"]
    weights.tensors["model.norm.weight"] = original.flip(0)
    report = sync.sync(41)
    assert report.num_tensors == len(weights.tensors)
    after = engine.greedy(prompt, 8)
    assert after["output_ids"] != before
    assert after["meta_info"]["weight_version"] == "41"
    weights.tensors["model.norm.weight"] = original
    sync.sync(42)
    assert engine.greedy(prompt, 8)["output_ids"] == before
    assert engine.weight_version() == "42"


def test_a_bit_flipped_on_the_way_is_caught_and_nothing_is_generated(
    engine: Engine, sync: WeightSync, transport: Transport, monkeypatch: pytest.MonkeyPatch
):
    send = transport.send

    def send_with_a_flipped_bit(bucket: list[tuple[str, Tensor]], version: str) -> None:
        flipped = [(name, tensor.clone()) for name, tensor in bucket]
        for name, tensor in flipped:
            if name == "model.norm.weight":
                tensor.view(torch.uint8)[0] ^= 1
        send(flipped, version)

    monkeypatch.setattr(transport, "send", send_with_a_flipped_bit)
    with pytest.raises(
        WeightSyncError, match=r"engine 0 .*does not hold version 43 .*: model\.norm\.weight has digest"
    ):
        sync.sync(43)
    waiting = engine.background({"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}})
    with pytest.raises(TimeoutError):
        waiting.result(timeout=0.7)
    engine.ok("/continue_generation", {})
    waiting.result(timeout=30)


@pytest.mark.sglang
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("model_type", "shape"),
    [("qwen2", {}), ("qwen3", {"tie_word_embeddings": False})],
    ids=["qwen2 with biases", "qwen3 untied with query and key norms"],
)
def test_stock_digests_of_other_families_are_foretold(
    stock: Stock, start_engine, tmp_path: Path, model_type: str, shape: dict
):
    heads = {} if stock.dtype == "float32" else HEADS_FOR_GPUS
    folder = save_tiny_model(tmp_path / model_type, model_type, dtype=stock.dtype, **{**heads, **shape})
    engine = start_engine("sglang", folder)
    engine.needs_digests()
    digests = expected_digests(engine)
    digests.add(tensors_of(str(folder)).items())
    assert engine.checksums() == digests.result()
