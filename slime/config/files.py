"""What the run finds on disk before it starts: kinds of checkpoint folders, and a model's config.json as plain data."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slime.config.errors import ConfigError

CheckpointKind = Literal["missing", "empty", "megatron", "huggingface"]


@dataclass(frozen=True)
class Files:
    """Facts about files that the plan depends on; tests write their own."""

    checkpoints: Mapping[str, CheckpointKind] = field(default_factory=dict)
    """Kind of every checkpoint folder that the command line (or a default) names."""
    hf_config: Mapping[str, Any] | None = None
    """The model's config.json; None if it could not be read or is not needed."""
    first_row: Mapping[str, Any] | None = None
    """First row of the prompt data; None if there is none."""
    sglang_config: Any = None
    """What --sglang-config holds, as plain data; None if it is not given."""

    def kind(self, path: str | None) -> CheckpointKind:
        """Kind of a checkpoint folder; `missing` for None."""
        return self.checkpoints.get(path, "missing") if path else "missing"


def checkpoint_kind(path: str) -> CheckpointKind:
    """What a folder holds: a Megatron checkpoint, a HuggingFace model, neither, or nothing at all."""
    folder = Path(path)
    if not folder.is_dir():
        return "missing"
    is_one = (folder.name.startswith("iter_") and folder.name[5:].isdigit()) or folder.name == "release"
    if (folder / "latest_checkpointed_iteration.txt").is_file() or (is_one and (folder / "metadata.json").is_file()):
        return "megatron"
    return "huggingface" if (folder / "config.json").is_file() else "empty"


def checkpoint_kinds(paths: Iterable[str | None]) -> dict[str, CheckpointKind]:
    """`checkpoint_kind` of every path that is given."""
    return {path: checkpoint_kind(path) for path in paths if path}


def read_hf_config(folder: str) -> dict[str, Any]:
    """A model folder's config.json; a vision model's `text_config` in its place.

    Raises:
        ConfigError: the folder is not a HuggingFace model folder.
    """
    path = Path(folder)
    example = "give the folder of a model, e.g. from `hf download Qwen/Qwen3-4B --local-dir Qwen3-4B`"
    if not path.is_dir():
        raise ConfigError(f"--hf-checkpoint {folder}: there is no such folder; {example}")
    if not (path / "config.json").is_file():
        raise ConfigError(f"--hf-checkpoint {folder}: has no config.json, so it is not a HuggingFace model; {example}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--hf-checkpoint {folder}: config.json, line {error.lineno}, is not JSON ({error.msg}); "
            "download the model again"
        ) from None
    if isinstance(config.get("text_config"), dict):
        outer = {k: v for k, v in config.items() if k in ("architectures", "tie_word_embeddings")}
        config = outer | config["text_config"] | {"architectures": config.get("architectures")}
    if not isinstance(config, dict):
        raise ConfigError(f"--hf-checkpoint {folder}: config.json is not a JSON object; download the model again")
    return config


def has_tokenizer(folder: str) -> bool:
    """Whether a model folder holds a tokenizer."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model", "tokenizer_config.json")
    return any((Path(folder) / name).is_file() for name in names)


def has_weights(folder: str) -> bool:
    """Whether a model folder holds weights."""
    return any(Path(folder).glob("*.safetensors")) or any(Path(folder).glob("*.bin"))


def has_chat_template(folder: str) -> bool:
    """Whether a model folder's tokenizer has a chat template."""
    path = Path(folder)
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if (path / "additional_chat_templates").is_dir():
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, json.JSONDecodeError):
        return False
