"""Writes what the model said into the run's folder, one JSON object a line, to be read by people and by jq."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from slime.observability.rollout_metrics import flatten_samples
from slime.observability.run_files import SAMPLES_DIR
from slime.utils.types import Sample

MAX_LISTED = 4096
"""Tokens of a sample whose ids and log-probs are written out."""


def write_samples(
    run_dir: Path | str, rollout_id: int, samples: Iterable[Any], tokenizer: Any = None, *, name: str = "rollout"
) -> Path:
    """Writes `<run_dir>/samples/<name>_<rollout_id>.jsonl`, replacing one of the same step.

    Args:
        samples: nested or flat.
        tokenizer: decodes the response of a sample that has tokens but no text.
        name: `rollout`, or `eval` for evaluations.

    Returns:
        the file's path.
    """
    return _write(run_dir, f"{name}_{_number(rollout_id)}", flatten_samples(samples), tokenizer)


def write_eval_samples(
    run_dir: Path | str, rollout_id: int, data: Mapping[str, Mapping[str, Any]], tokenizer: Any = None
) -> list[Path]:
    """Writes `eval_<rollout_id>_<task>.jsonl` for each task of an evaluation; returns the paths.

    Args:
        data: per task {"samples": [...]}, as an evaluation function returns it; a task without samples has no file.
    """
    paths = []
    for task, answers in data.items():
        if samples := flatten_samples(answers.get("samples") or []):
            stem = f"eval_{_number(rollout_id)}_{re.sub(r'[^A-Za-z0-9._-]', '_', task)}"
            paths.append(_write(run_dir, stem, samples, tokenizer))
    return paths


def sample_row(sample: Sample, tokenizer: Any = None) -> dict[str, Any]:
    """What one line says of a sample. Floats are written so that they are read back bit by bit.

    `tokens` are the prompt's and the response's ids, `log_probs` [R] nats as the engine reported them.
    """
    response = sample.response
    if not response and sample.response_length and tokenizer is not None:
        response = tokenizer.decode(sample.tokens[-sample.response_length :])
    return {
        "index": sample.index,
        "group_index": sample.group_index,
        "reward": sample.reward,
        "label": sample.label,
        "prompt": sample.prompt,
        "response": response,
        "status": sample.status.value,
        "prompt_length": max(len(sample.tokens) - sample.response_length, 0),
        "response_length": sample.response_length,
        "trained_length": sample.effective_response_length,
        "weight_versions": sample.weight_versions,
        "removed": sample.remove_sample,
        "tokens": _listed(sample.tokens),
        "log_probs": _listed(sample.rollout_log_probs),
    }


def _listed(values: Sequence[int] | Sequence[float] | None) -> list[Any] | str | None:
    """Numbers that `slime diff` compares; of very many a digest, which still tells whether two are the same."""
    if values is None:
        return None
    if len(values) <= MAX_LISTED:
        return list(values)
    numbers = [value.item() if hasattr(value, "item") else value for value in values]
    digest = hashlib.blake2b(json.dumps(numbers).encode(), digest_size=16).hexdigest()
    return f"{len(numbers)} numbers, blake2b {digest}"


def _number(rollout_id: int) -> str:
    return f"{rollout_id:06d}" if rollout_id >= 0 else "initial"


def _write(run_dir: Path | str, stem: str, samples: Iterable[Sample], tokenizer: Any) -> Path:
    folder = Path(run_dir) / SAMPLES_DIR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.jsonl"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as lines:
        for sample in samples:
            lines.write(_line(sample_row(sample, tokenizer)))
    partial.replace(path)
    return path


def _line(row: dict[str, Any]) -> bytes:
    """The row as JSON, with null for numbers that JSON does not have."""
    try:
        return orjson.dumps(row, default=_plain, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a very large integer, or half of a surrogate pair, which the slower way writes
        written = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False, default=lambda v: _finite(_plain(v)))
        return f"{written}\n".encode(errors="backslashreplace")


def _plain(value: Any) -> Any:
    """For what JSON does not have: the number of a numpy or torch scalar, and the `repr` of anything else."""
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        value = value.item()
    return value if isinstance(value, bool | int | float | str) else repr(value)


def _finite(value: Any) -> Any:
    """The same value with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
