"""What the engine computes equals transformers' own forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slime.backends.embedded.engine import Engine, EngineSettings
from slime.backends.embedded.linear import FusedRMSNorm, PackedMatrix, StackedLinear
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.scheduler import Request
from tests.contracts.engine.tiny_model import save_tiny_model
from tests.unit.embedded.conftest import queue, random_prompt

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    (
        "llama",
        dict(
            tie_word_embeddings=False,
            hidden_size=72,
            head_dim=24,
            num_attention_heads=3,
            num_key_value_heads=1,
            intermediate_size=101,
            attention_bias=True,
        ),
    ),
    ("qwen2", {}),
    ("qwen2", dict(tie_word_embeddings=False, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    ("qwen3", {}),
    ("qwen3", dict(tie_word_embeddings=False, hidden_size=40, head_dim=12, intermediate_size=55)),
    ("glm4", {}),
    ("phi3", {}),
    ("gemma3_text", {}),
    ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)),
    (
        "glm4_moe",
        dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1),
    ),
]


def reference_log_probs(model: Any, request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the prompt's tokens from the second on, of the output), by one forward pass over the sequence alone."""
    with torch.no_grad():
        logits = model(torch.tensor([request.tokens()])).logits[0].float()
    split = len(request.prompt)
    inputs = torch.log_softmax(logits[: split - 1], -1).gather(1, torch.tensor(request.prompt[1:])[:, None])[:, 0]
    scaled = logits[split - 1 : -1] / request.sampling.temperature
    outputs = torch.log_softmax(scaled, -1).gather(1, torch.tensor(request.output)[:, None])[:, 0]
    return inputs, outputs


@pytest.mark.parametrize(("family", "shape"), FAMILIES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(FAMILIES)])
def test_log_probs_equal_transformers(tmp_path: Path, family: str, shape: dict[str, Any]):
    """More requests than rows, prompts shared by three, of odd lengths, ending at different times: 1e-4 each."""
    folder = save_tiny_model(tmp_path / family, family, **shape)
    engine = Engine(ServedModel(folder, torch.float32), EngineSettings(max_running_requests=4, context_length=128))
    prompts = [random_prompt(length, seed=length) for length in (5, 33, 2)]
    requests = [
        queue(engine, prompts[i % 3], 11 + 3 * i, temperature=0.7, logprob_start=0 if i < 6 else -1) for i in range(9)
    ]
    engine.run_until_idle()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for i, request in enumerate(requests):
        inputs, outputs = reference_log_probs(reference, request)
        assert len(request.output) == 11 + 3 * i
        torch.testing.assert_close(
            torch.tensor(request.output_log_probs.values), outputs, atol=1e-4, rtol=0, check_dtype=False
        )
        if i < 6:
            assert request.input_log_probs.values[0] is None
            values = torch.tensor(request.input_log_probs.values[1:])
            torch.testing.assert_close(values, inputs, atol=1e-4, rtol=0, check_dtype=False)


@pytest.mark.parametrize("prefix", [16, 40])
def test_a_copied_prefix_changes_nothing(new_engine: Any, tiny_llama: Path, prefix: int):
    """The second prompt takes its first tokens from the cache of the first, which is still running."""
    engine = new_engine()
    shared = random_prompt(prefix)
    first = queue(engine, [*shared, 7, 8], 30)
    engine.step()
    second = queue(engine, [*shared, 9, 10, 11], 6, logprob_start=prefix)
    engine.run_until_idle()
    assert first.cached_tokens == 0 and second.cached_tokens == prefix
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    inputs, outputs = reference_log_probs(reference, second)
    torch.testing.assert_close(
        torch.tensor(second.output_log_probs.values), outputs, atol=1e-4, rtol=0, check_dtype=False
    )
    assert second.input_log_probs.tokens == [9, 10, 11]
    torch.testing.assert_close(
        torch.tensor(second.input_log_probs.values[1:]), inputs[prefix:], atol=1e-4, rtol=0, check_dtype=False
    )


def test_linear_layers_that_read_the_same_input_become_one(served: ServedModel):
    layer = served.module.model.layers[0].layer
    assert isinstance(layer.self_attn.q_proj, StackedLinear) and len(layer.self_attn.q_proj.sizes) == 3
    assert isinstance(layer.mlp.gate_proj, StackedLinear) and len(layer.mlp.gate_proj.sizes) == 2
    assert isinstance(layer.input_layernorm, FusedRMSNorm)


def test_a_norm_with_other_arithmetic_stays_as_it_is(tmp_path: Path):
    """Gemma's norm multiplies by 1 + weight."""
    model = ServedModel(save_tiny_model(tmp_path / "gemma", "gemma3_text"), torch.float32)
    assert not any(isinstance(module, FusedRMSNorm) for module in model.module.modules())


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "capped attention scores"), ("qwen3_next", "linear_attention")]
)
def test_a_family_that_would_be_computed_wrongly_is_refused(tmp_path: Path, family: str, reason: str):
    folder = save_tiny_model(tmp_path / family, family)
    with pytest.raises(ValueError, match=reason) as error:
        ServedModel(folder, torch.float32)
    assert "--rollout-engine sglang" in str(error.value)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bf16 instructions")
def test_bf16_is_packed_and_close_to_fp32(tiny_llama: Path):
    model = ServedModel(tiny_llama, torch.bfloat16)
    assert isinstance(model.module.lm_head.matrix, PackedMatrix)
    engine = Engine(model, EngineSettings(max_running_requests=4, context_length=128))
    request = queue(engine, random_prompt(20), 30)
    engine.run_until_idle()
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    _, outputs = reference_log_probs(reference, request)
    difference = torch.tensor(request.output_log_probs.values) - outputs
    assert difference.abs().mean() < 0.1
