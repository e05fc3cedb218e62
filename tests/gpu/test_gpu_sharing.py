"""What sharing a GPU rests on: a sleeping trainer holds next to nothing and wakes as it was; another process reads its
buckets, and gives them back."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.weight_sync.ipc import cuda_handle, flattened, payload
from tests.distributed import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

TRAIN = """
import gc, json, sys, torch
from pathlib import Path
from tests.distributed import tiny
from slime.backends.megatron.trainer import MegatronTrainer

def live_bytes():
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and thing.is_cuda]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())

changes, model, out, naps = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[5] == "naps"
trainer = MegatronTrainer(tiny.training_args(model, **changes), 0, 1, "127.0.0.1", int(sys.argv[4]))
trainer.init()
held = []
for i, seed in enumerate((3, 4, 5)):
    trainer.wake_up()
    data = tiny.rollout(seed=seed, longest_prompt=40, longest_response=60)
    trainer.train(i, tiny.shard_of(trainer, data))
    if naps:
        trainer.sleep(keep_weights=True)
        in_the_sync = {name: tensor.cpu() for name, tensor in tiny.hf_weights(trainer).items()}  # not counted below
        trainer.sleep()
        held.append((live_bytes(), torch.cuda.memory_reserved()))
        with trainer.weights_at_hand():
            awake = {name: tensor.cpu() for name, tensor in tiny.hf_weights(trainer).items()}
            assert tiny.largest_difference(awake, in_the_sync) == 0
            del awake
trainer.wake_up()
weights = {name: tensor.cpu() for name, tensor in tiny.hf_weights(trainer).items()}
torch.save({"weights": weights, "held": held}, out)
trainer.close()
"""

READ = """
import base64, hashlib, pickle, sys, torch
bucket = pickle.loads(base64.b64decode(sys.stdin.read()))
whole = bucket["flattened_tensor"]
for entry in bucket["metadata"]:
    part = whole[entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape)
    print(entry.name, hashlib.sha256(part.cpu().view(torch.uint8).numpy().tobytes()).hexdigest())
del whole, part, bucket
torch.cuda.synchronize()
"""


def _python(program: str, *words: str, stdin: str | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, input=stdin, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_sleeping_trainer_holds_nothing_and_wakes_as_it_was(tmp_path: Path, distributed_optimizer: bool) -> None:
    from slime.utils.processes import free_port

    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_hidden_layers=4)
    model = tiny.save_hf_model(tmp_path, "qwen3", **sizes)
    changes: dict[str, Any] = dict(
        hidden_size=512, num_attention_heads=8, num_query_groups=4, kv_channels=64, num_layers=4, device="cuda",
        bf16=True, use_distributed_optimizer=distributed_optimizer, deterministic_mode=True,
    )  # fmt: skip
    results = []
    for mode in ("naps", "awake"):
        out = tmp_path / f"{mode}.pt"
        _python(TRAIN, json.dumps(changes), str(model), str(out), str(free_port("127.0.0.1")), mode)
        results.append(torch.load(out))
    naps, awake = results
    assert tiny.largest_difference(naps["weights"], awake["weights"]) == 0
    for in_tensors, reserved in naps["held"]:
        assert in_tensors < MIB, "tensors that nobody counted stay on the GPU"
        assert reserved < 256 * MIB, "beside cuBLAS's workspaces the allocator keeps what it was to give back"


def test_another_process_reads_a_bucket_and_its_memory_comes_back() -> None:
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    bucket = [
        ("half", torch.randn(3000, 17, device="cuda").bfloat16()),
        ("byte", torch.arange(5, dtype=torch.uint8, device="cuda")),
        ("single", torch.randn(70_000, device="cuda")),
    ]
    expected = [
        f"{name} {hashlib.sha256(tensor.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()}"
        for name, tensor in bucket
    ]
    buffer, layout = flattened(bucket)
    torch.cuda.synchronize()
    text = payload(cuda_handle(buffer, 0), layout)
    del bucket, buffer
    assert torch.cuda.memory_allocated() > before, "memory that was exported waits for its reader"
    assert _python(READ, stdin=text).splitlines() == expected
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before
