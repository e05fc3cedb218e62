"""A loaded HuggingFace model computes what transformers computes, and goes back to HuggingFace bit for bit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.pool import RankError, RankPool

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def _settings(model_type: str, case: int) -> dict[str, Any]:
    """Random sizes: 1 to 3 groups, odd vocabularies, heads that do not add up to the hidden size."""
    draw = random.Random(f"{model_type}{case}")
    groups = draw.choice([1, 2, 3])
    heads = groups * draw.choice([1, 2, 3])
    head_dim = draw.choice([8, 12, 16])
    settings: dict[str, Any] = dict(
        hidden_size=heads * (head_dim if model_type == "qwen2" else draw.choice([8, 10, 14])),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=draw.choice([33, 64, 90]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        vocab_size=draw.choice([67, 101, 128]),
        tie_word_embeddings=draw.random() < 0.5,
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
    )
    if model_type == "qwen2":
        del settings["head_dim"]
    if model_type == "llama" and draw.random() < 0.5:
        settings["rope_parameters"] = LLAMA3_ROPE
    return settings


def _ours(rank: int, world_size: int, port: int, args: Any, tokens: list[Tensor], lengths: list[int]) -> Any:
    """Logits of the sequences one after the other; log-probs of the responses without and with a shared prompt."""
    from slime.backends.megatron.head import HeadOptions
    from slime.backends.megatron.trainer import MegatronTrainer
    from slime.data.packing import pack

    trainer = MegatronTrainer(args, rank, world_size, "127.0.0.1", port)
    trainer.init()
    model, groups = trainer.job.models[0], [0] * len(tokens)
    plain, shared = (pack(tokens, lengths, groups, share_prompts=is_shared) for is_shared in (False, True))
    with torch.no_grad():
        logits = model(plain, HeadOptions(), wants_logits=True).logits[0]
        log_probs = [model(packed, HeadOptions()).log_probs for packed in (plain, shared)]
    trainer.save_hf(args.save)
    trainer.close()
    return logits, *log_probs


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_logits_equal_those_of_transformers_and_weights_come_back_bit_for_bit(
    ranks: RankPool, tmp_path: Path, model_type: str, case: int
) -> None:
    folder = tiny.save_hf_model(tmp_path / "hf", model_type, seed=case, **_settings(model_type, case))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(case)
    prompt, *responses = (
        torch.randint(0, model.config.vocab_size, (n,), generator=generator) for n in (9, 7, 1, 12, 4)
    )
    tokens = [torch.cat([prompt, response]) for response in responses]
    with torch.no_grad():
        expected = [model(ids[None]).logits[0].float() for ids in tokens]
    expected_log_probs = torch.cat(
        [
            torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, response[:, None]).squeeze(1)
            for logits, response in zip(expected, responses, strict=True)
        ]
    )

    args = tiny.training_args(folder, save=str(tmp_path / "out"))
    lengths = [len(response) for response in responses]
    logits, log_probs, log_probs_shared = ranks.run(_ours, 1, args, tokens, lengths)[0]
    assert logits.abs().max() > 0.5, "logits near zero would prove nothing"
    torch.testing.assert_close(logits, torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs_shared, expected_log_probs, atol=1e-5, rtol=0)
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def _load(rank: int, world_size: int, port: int, args: Any) -> None:
    from slime.backends.megatron.trainer import MegatronTrainer

    MegatronTrainer(args, rank, world_size, "127.0.0.1", port).init()


@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen"])
def test_a_checkpoint_that_is_not_the_models_is_refused_with_the_tensors_name(
    ranks: RankPool, tmp_path: Path, damage: str
) -> None:
    folder = tiny.save_hf_model(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors[name := "model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RankError, match=name.replace(".", r"\.")):
        ranks.run(_load, 1, tiny.training_args(folder))
