"""Tiny random checkpoints with a real tokenizer: an engine under test starts in seconds and needs no download."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# All of ASCII that prints, and a few bytes that are letters only together: most of what a random model writes is
# text, and now and then a letter is cut in two.
ALPHABET = "".join(map(chr, range(32, 127))) + "\n" + "é€"
TEXT_TO_LEARN_MERGES_FROM = [
    "Two and two make four, and four and four make eight.",
    "The engine answers a question, one token after another token, until it stops.",
    "What is the sum of 3 and 5? The answer is <answer>8</answer>.",
    "A wheel turns; the wheel that turns the wheel turns too.",
]


def save_tokenizer(folder: Path, vocab_size: int = 400) -> int:
    """Train a byte-level BPE on a few sentences, save it with a chat template, and return its size."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted({symbol for piece, _ in byte_level.pre_tokenize_str(ALPHABET) for symbol in piece}),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT_TO_LEARN_MERGES_FROM, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=16384
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return len(wrapped)


def save_tiny_model(
    folder: Path, model_type: str = "llama", *, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> Path:
    """Save a two-layer model of `model_type` with its tokenizer in HuggingFace format; returns `folder`.

    The head's weights are wide (standard deviation 0.2), so that a token's probability is far from uniform and
    greedy decoding has no near ties.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = save_tokenizer(folder)
    shape: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=16384,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    if model_type == "qwen2":
        del shape["head_dim"]
    config = AutoConfig.for_model(model_type, **{**shape, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # transformers starts them at 0 and 1: nothing to mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
