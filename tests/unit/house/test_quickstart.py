"""The quick start's data, model and report are what its pages say."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import Programs


def test_no_held_out_sum_was_trained_on_in_any_order(program: Programs) -> None:
    training, held_out = program("examples/quickstart/prepare.py")["split_sums"]()
    assert len(held_out) == len(set(held_out)) == 200
    assert not {frozenset(pair) for pair in training} & {frozenset(pair) for pair in held_out}
    assert (2, 6) not in training + held_out and (6, 2) not in training + held_out
    assert len(training) + len(held_out) == 19 * 19 - 2


def test_a_prompt_ends_where_the_sum_begins_and_its_label_is_the_sum(program: Programs) -> None:
    assert program("examples/quickstart/prepare.py")["row"](7, 12) == {"prompt": "2 + 6 = 8\n7 + 12 =", "label": "19"}


def test_bf16_bytes_round_as_torch_does(program: Programs) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    values = torch.cat([values, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.0e38, 1e-40])])  # ties, extremes
    ours = program("examples/quickstart/model.py")["bf16_bytes"](values.numpy())
    assert ours == values.bfloat16().view(torch.int16).numpy().tobytes()


def test_query_rows_get_back_to_where_huggingface_keeps_them(program: Programs) -> None:
    """One head of 4 rows: GGUF stores rows 0, 2, 1, 3 (each row beside the one that is half a head away)."""
    stored = np.array([[0.0], [2.0], [1.0], [3.0]])
    restored = program("examples/quickstart/model.py")["half_rotation_layout"](stored, 1)
    assert restored[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_converted_gguf_file_loads_as_the_model_it_was_made_from(program: Programs, tmp_path: Path) -> None:
    """Names, layouts, config and the digit split, through a file written as llama.cpp's converter writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 1000.0, "rope_type": "default"},
    )
    original = LlamaForCausalLM(config)
    for weight in original.parameters():
        weight.data = weight.data.bfloat16().float()  # values that bf16 keeps exactly
    write_gguf(tmp_path / "tiny.gguf", original)
    out = tmp_path / "hf"
    out.mkdir()
    program("examples/quickstart/model.py")["convert"](tmp_path / "tiny.gguf", out)

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, weight in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, original(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("12").input_ids == [4, 5]  # although the vocabulary has a merged "12"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def write_gguf(path: Path, model: Any) -> None:
    """What llama.cpp's converter makes of a tied llama, in fp32."""
    from gguf import GGUFWriter

    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(1000.0)
    writer.add_vocab_size(c.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "a", "1", "2", "12"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens + [f"t{i}" for i in range(len(tokens), c.vocab_size)])
    writer.add_token_types([3, 3, 3] + [1] * (c.vocab_size - 3))
    writer.add_token_merges(["1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().float().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().float().numpy())
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach().float().numpy()
            if num_heads := heads.get(ours.split(".")[-1]):
                half = weight.shape[0] // num_heads // 2
                weight = weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{index}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_that_is_not_the_published_one_is_refused(program: Programs, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match=r"SHA-256 .* was published with b179c952"):
        program("examples/quickstart/model.py")["check_hash"](tmp_path / "other.gguf")


def test_a_folder_of_someone_else_is_not_replaced(program: Programs, tmp_path: Path) -> None:
    fresh, out = tmp_path / "fresh", tmp_path / "out"
    fresh.mkdir()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="was not written by this script"):
        program("examples/quickstart/model.py")["move_into_place"](fresh, out)
    assert (out / "precious.txt").read_text() == "mine"


def test_the_command_line_is_one_that_train_py_takes(repository: Path, tmp_path: Path) -> None:
    """The flags exist, agree with each other and with the prompt files; only the model is a small stand-in."""
    from slime.arguments import parse_args

    data = tmp_path / "data"
    prepare = [repository / "examples/quickstart/prepare.py", "--out", data, "--without-model"]
    subprocess.run([sys.executable, *prepare], check=True, capture_output=True)
    write_small_model(data / "SmolLM2-135M-Instruct")
    script = 'DATA="$1" RUN_NAME=test; source examples/quickstart/args.sh; printf "%s\\0" "${ARGS[@]}"'
    words = subprocess.run(
        ["bash", "-c", script, "bash", data], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.split("\0")[:-1]
    args = parse_args([*words, "--device", "cpu", "--output-dir", str(tmp_path)])
    assert (args.rollout_batch_size, args.n_samples_per_prompt, args.global_batch_size) == (16, 8, 128)
    assert args.rollout_stop == ["\n"]
    assert [(task.name, task.path) for task in args.eval_datasets] == [("held_out", str(data / "held_out.jsonl"))]


def write_small_model(folder: Path) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def test_the_report_says_what_was_earned_and_what_it_cost(repository: Path, tmp_path: Path) -> None:
    lines = [{"step": -1, "eval/held_out": 0.5}]
    lines += [{"step": step, "rollout/raw_reward": step / 10, "perf/step_time": 1.0} for step in range(10)]
    lines[-1]["eval/held_out"] = 0.75
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = tmp_path / "samples"
    samples.mkdir()
    for name, responses in {"initial": [" 8\n", " 8\n", " what"], "000009": [" 7\n", " 3 + 8 = 11", " 12\n"]}.items():
        rows = [json.dumps({"response": response}) + "\n" for response in responses]
        (samples / f"eval_{name}_held_out.jsonl").write_text("".join(rows))
    cost = {"wall_s": 100.0, "cpu_s": 180.0, "by_name_s": {"trainer": 120.0, "engine": 60.0}}
    (tmp_path / "cost.json").write_text(json.dumps(cost))

    command = [
        sys.executable,
        "examples/quickstart/report.py",
        tmp_path,
        "--set-up-wall-s",
        "20",
        "--set-up-cpu-s",
        "30",
    ]
    text = subprocess.run(
        command,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "0.100 in the first 3 steps -> 0.700 in the last 5" in text
    assert "0.500 before training -> 0.750 after it" in text
    assert "3 prompts; distinct answers 1 -> 3" in text
    assert "120 s: set-up and data 20, train.py 100" in text
    assert "210 s: set-up and data 30, train.py and all its processes 180" in text
