"""What only the embedded engine does over HTTP: shared memory, real release of memory, cancelled clients, dying.

Everything that stock SGLang does too is in tests/contracts/engine.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from slime.backends.base import EngineSpec
from slime.backends.embedded.launch import server_command
from slime.utils.processes import ServerProcess, free_port
from slime.weight_sync.digest import tensor_digest
from tests.contracts.engine.tiny_model import save_tiny_model

HOST = "127.0.0.1"
VOCAB_FOR_MEMORY = 40_000


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small layers under a vocabulary of 40 MB, so that memory can be seen to come and go."""
    return save_tiny_model(tmp_path_factory.mktemp("server") / "llama", vocab_size=VOCAB_FOR_MEMORY, hidden_size=256)


class Server:
    """A running engine process."""

    def __init__(self, port: int, process: ServerProcess, weights_dir: Path) -> None:
        self.http = httpx.Client(base_url=f"http://{HOST}:{port}", timeout=30, trust_env=False)
        self.port, self.process, self.weights_dir = port, process, weights_dir

    def ok(self, path: str, body: Any = None) -> Any:
        reply = self.http.post(path, json=body if body is not None else {})
        assert reply.status_code == 200, f"{path}: {reply.status_code} {reply.text}"
        return reply.json() if reply.content else None

    def refused(self, path: str, body: Any, status: int) -> str:
        reply = self.http.post(path, json=body)
        assert reply.status_code == status, f"{path}: {reply.status_code} {reply.text}"
        return reply.text

    def greedy(self) -> list[int]:
        sampling = {"max_new_tokens": 6, "temperature": 0}
        return self.ok("/generate", {"input_ids": [5, 6, 7], "sampling_params": sampling})["output_ids"]

    def checksums(self) -> dict[str, str]:
        return self.ok("/weights_checker", {"action": "checksum"})["ranks"][0]["checksums"]

    def num_running(self) -> int:
        load = self.http.get("/v1/loads?include=core").json()["loads"][0]
        return load["num_running_reqs"] + load["num_waiting_reqs"]


@pytest.fixture(scope="module")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("engine")
    weights_dir = folder / "weights"
    weights_dir.mkdir()
    port = free_port(HOST)
    spec = EngineSpec(
        index=0,
        host=HOST,
        port=port,
        num_devices=1,
        device="cpu",
        device_ids=(),
        model_path=str(model_path),
        dtype="float32",
        threads=1,
        log_path=folder / "log",
        weights_dir=weights_dir,
        seed=1,
    )
    argv, env = server_command(Namespace(), spec)
    process = ServerProcess("engine", argv, env, spec.log_path)
    process.start()
    try:
        process.wait_until_healthy(f"http://{HOST}:{port}/health", 120)
        yield Server(port, process, weights_dir)
    finally:
        process.terminate()


@pytest.fixture(autouse=True)
def paused_state(server: Server) -> Iterator[None]:
    """Tests start and end with an engine that generates."""
    yield
    server.ok("/continue_generation")


def write_bucket(folder: Path, tensors: dict[str, torch.Tensor], **fields: Any) -> dict[str, Any]:
    """A file of raw tensors and the manifest that describes it."""
    entries, data = [], b""
    for name, tensor in tensors.items():
        entries.append({"name": name, "dtype": str(tensor.dtype), "shape": list(tensor.shape), "offset": len(data)})
        data += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    (folder / "bucket.bin").write_bytes(data)
    return {"file": "bucket.bin", "tensors": entries} | fields


def test_weights_travel_through_shared_memory_in_buckets(server: Server, model_path: Path):
    old = load_file(model_path / "model.safetensors")
    new = {name: tensor * 0.9 for name, tensor in old.items()}
    before = server.greedy()
    names = sorted(new)
    for version, weights in (("7", new), ("8", old)):
        server.ok("/pause_generation", {"mode": "abort"})
        for start in range(0, len(names), 7):
            part = {name: weights[name] for name in names[start : start + 7]}
            is_last = start + 7 >= len(names)
            reply = server.ok(
                "/update_weights_from_shared_memory",
                write_bucket(server.weights_dir, part, weight_version=version, last=is_last),
            )
            assert reply["success"] and reply["num_tensors"] == len(part)
            told = server.http.get("/get_weight_version").json()["weight_version"]
            assert (told == version) == is_last
        assert server.checksums() == {name: tensor_digest(tensor.contiguous()) for name, tensor in weights.items()}
        server.ok("/continue_generation")
    assert server.greedy() == before


def test_weights_are_not_taken_over_while_generating(server: Server, model_path: Path):
    tensors = {"model.norm.weight": torch.zeros(256)}
    before = server.checksums()
    text = server.refused("/update_weights_from_shared_memory", write_bucket(server.weights_dir, tensors), 409)
    assert "/pause_generation" in text
    assert server.checksums() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "../log"}, "bare name of a file"),
        ({"file": "/etc/passwd"}, "bare name of a file"),
        ({"file": "absent.bin"}, "does not exist"),
        ({"digests": {"model.norm.weight": "0" * 32}}, "was changed on the way"),
        ({"tensors": [{"name": "x"}]}, "must be {'name', 'dtype', 'shape', 'offset'}"),
        (
            {"tensors": [{"name": "model.norm.weight", "dtype": "float32", "shape": [256], "offset": 4}]},
            "which has 1024 bytes",
        ),
        (
            {"tensors": [{"name": "model.norm.weight", "dtype": "float32", "shape": [128], "offset": 0}]},
            "came as [128] but is served as [256]",
        ),
        (
            {"tensors": [{"name": "model.norm.weight", "dtype": "bfloat16", "shape": [256], "offset": 0}]},
            "served as torch.float32",
        ),
        ({"tensors": [{"name": "lm_head", "dtype": "float32", "shape": [256], "offset": 0}]}, "serves no tensor"),
    ],
)
def test_a_wrong_bucket_changes_nothing(server: Server, change: dict[str, Any], words: str):
    server.ok("/pause_generation")
    before = server.checksums()
    manifest = write_bucket(server.weights_dir, {"model.norm.weight": torch.zeros(256)}) | change
    assert words in server.refused("/update_weights_from_shared_memory", manifest, 400)
    assert server.checksums() == before


def test_a_link_out_of_the_weights_folder_is_not_followed(server: Server, model_path: Path):
    server.ok("/pause_generation")
    link = server.weights_dir / "link.bin"
    link.symlink_to(model_path / "model.safetensors")
    assert "bare name" in server.refused("/update_weights_from_shared_memory", {"file": "link.bin", "tensors": []}, 400)


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def server_pid(port: int) -> int:
    """The process that listens on a port: the one whose command line names it."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"slime.backends.embedded.server" in command and str(port).encode() in command and b"-I" not in command:
                return int(folder.name)
    raise AssertionError("no server process")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_memory_goes_back_and_nothing_is_generated_without_weights(server: Server, model_path: Path):
    pid = server_pid(server.port)
    before, expected = resident_mb(pid), server.greedy()
    version = server.http.get("/get_weight_version").json()["weight_version"]
    server.ok("/pause_generation")
    assert server.http.get("/flush_cache").status_code == 200
    server.ok("/release_memory_occupation", {"tags": ["weights", "kv_cache"]})
    after = resident_mb(pid)
    # the lookup table and the packed head are 39 MB each
    assert before - after > 70, f"{before:.0f} MB before, {after:.0f} MB after"
    request = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2}}
    server.ok("/continue_generation")
    assert "/resume_memory_occupation" in server.refused("/generate", request, 503)
    disk = {"model_path": str(model_path)}
    assert "/resume_memory_occupation" in server.refused("/update_weights_from_disk", disk, 400)
    server.ok("/resume_memory_occupation", {"tags": ["weights"]})
    assert "kv_cache is released" in server.refused("/generate", request, 503)
    server.ok("/resume_memory_occupation", {"tags": ["kv_cache"]})
    assert "not loaded again" in server.refused("/generate", request, 503)
    assert "not loaded again" in server.refused("/weights_checker", {"action": "checksum"}, 400)
    server.ok("/update_weights_from_disk", disk | {"weight_version": version})
    assert server.greedy() == expected


def test_the_last_bucket_must_complete_the_weights(server: Server, model_path: Path):
    weights = load_file(model_path / "model.safetensors")
    server.ok("/pause_generation")
    server.ok("/release_memory_occupation", {"tags": ["weights"]})
    server.ok("/resume_memory_occupation", {"tags": ["weights"]})
    version = server.http.get("/get_weight_version").json()["weight_version"]
    kept = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    manifest = write_bucket(server.weights_dir, kept, weight_version="99", last=True)
    assert "1 tensors never came, such as model.norm" in server.refused(
        "/update_weights_from_shared_memory", manifest, 400
    )
    assert server.http.get("/get_weight_version").json()["weight_version"] == version
    rest = {"model.norm.weight": weights["model.norm.weight"]}
    manifest = write_bucket(server.weights_dir, rest, weight_version=version, last=True)
    server.ok("/update_weights_from_shared_memory", manifest)
    assert server.checksums() == {name: tensor_digest(tensor.contiguous()) for name, tensor in weights.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(server: Server, stream: bool):
    body = json.dumps(
        {"input_ids": [5], "stream": stream, "sampling_params": {"max_new_tokens": 8000, "ignore_eos": True}}
    )
    client = socket.create_connection((HOST, server.port))
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body.encode())
    wait_for(lambda: server.num_running() == 1)
    client.close()
    wait_for(lambda: server.num_running() == 0)


def test_a_request_that_is_sent_again_ends_the_older_one(server: Server):
    """A retry never leaves two running: the older waiter learns that it was aborted, the newer gets the reply."""
    sampling = {"max_new_tokens": 8000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "rid": "again"}
    expected = server.greedy()
    with ThreadPoolExecutor(1) as pool:
        older = pool.submit(server.ok, "/generate", body)
        wait_for(lambda: server.num_running() == 1)
        newer = server.ok("/generate", body | {"sampling_params": sampling | {"max_new_tokens": 6}})
        first = older.result(30)
    assert newer["output_ids"] == expected and newer["meta_info"]["finish_reason"]["type"] == "length"
    assert first["meta_info"]["finish_reason"]["type"] == "abort"
    assert first["meta_info"]["finish_reason"]["message"] == "The request was sent again."
    assert server.num_running() == 0


def test_an_older_client_that_leaves_does_not_take_its_retry_along(server: Server):
    sampling = {"max_new_tokens": 8000, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "rid": "left"}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/generate", json=body, timeout=0.3)
    reply = server.ok("/generate", body | {"sampling_params": sampling | {"max_new_tokens": 50}})
    assert reply["meta_info"]["finish_reason"]["type"] == "length" and len(reply["output_ids"]) == 50
    wait_for(lambda: server.num_running() == 0)


def test_a_client_that_leaves_while_paused_is_forgotten(server: Server):
    server.ok("/pause_generation")
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/generate", json={"input_ids": [5], "sampling_params": {}}, timeout=0.5)
    server.ok("/continue_generation")
    time.sleep(0.3)
    assert server.num_running() == 0


def test_snapshot_reset_and_compare(server: Server, model_path: Path):
    server.ok("/weights_checker", {"action": "snapshot"})
    server.ok("/weights_checker", {"action": "reset_tensors"})
    assert "differ from the snapshot" in server.refused("/weights_checker", {"action": "compare"}, 400)
    server.ok("/update_weights_from_disk", {"model_path": str(model_path)})
    server.ok("/weights_checker", {"action": "compare"})
    assert "Unsupported action" in server.refused("/weights_checker", {"action": "tea"}, 400)


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_dies_with_the_process_that_started_it(tiny_llama: Path):
    """SIGKILL to the parent, without any watchdog between them."""
    port = free_port(HOST)
    command = [sys.executable, "-m", "slime.backends.embedded.server", "--model-path", str(tiny_llama)]
    starter = f"import subprocess, sys, time; subprocess.Popen({[*command, '--port', str(port)]!r}); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", starter])
    try:
        wait_for(lambda: _is_healthy(port), 90)
        pid = server_pid(port)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        parent.kill()
        parent.wait()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://{HOST}:{port}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
