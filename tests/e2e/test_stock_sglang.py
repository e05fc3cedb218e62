"""The whole stack with stock SGLang servers, which run without a GPU in an environment of their own."""

from pathlib import Path

import pytest

from tests.contracts.engine.tiny_model import save_tiny_model

from .conftest import Train

pytestmark = pytest.mark.sglang


@pytest.mark.timeout(900)
@pytest.mark.parametrize("transport", ["nccl", "disk"])
def test_two_steps_on_a_stock_server(
    train: Train, stock_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Weights travel over gloo (or files), and each version is proved by the server's own checksums."""
    monkeypatch.setenv("SLIME_SGLANG_PYTHON", str(stock_python))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{a} + {a} =", "label": "{2 * a}"}}\n' for a in range(8)))
    model = save_tiny_model(tmp_path / "llama")
    run = train(
        [
            *("--rollout-engine", "sglang", "--hf-checkpoint", str(model), "--prompt-data", str(prompts)),
            *("--rm-type", "random", "--num-rollout", "2", "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
            *("--num-steps-per-rollout", "1", "--rollout-max-response-len", "8", "--lr", "1e-3", "--no-bf16"),
            *("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1", "--lr-decay-style", "constant"),
            *("--update-weight-transport", transport, "--update-weight-disk-dir", str(tmp_path / "sync")),
        ]
    )
    assert [step["step"] for step in run.steps] == [0, 1]
    # The second rollout is made with weights that training moved; were they not the trainer's, this would be large.
    assert max(run.column("train/train_rollout_logprob_abs_diff")) < 1e-4
    assert run.output.count("proved in") == 3
