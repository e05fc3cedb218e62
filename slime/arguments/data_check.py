"""Looks at prompt files before anything starts: they exist, their first rows parse, and the fields are there."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slime.config.errors import ConfigError, did_you_mean

NUM_ROWS = 100
_SLICE = re.compile(r"(?P<path>.*)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
NEEDS_LABEL = ("math", "deepscaler", "dapo", "f1", "answer_tag", "last_number")


@dataclass(frozen=True)
class Row:
    """One row and where it stands: `file:line`."""

    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """What the rows of a file must have."""

    flag: str
    input_key: str
    label_key: str | None = None
    metadata_key: str = "metadata"
    tool_key: str | None = "tools"
    multimodal_keys: Mapping[str, Any] | None = None
    needs_label: str | None = None
    """The reward that compares with an answer, if one does."""
    renders_chats: bool = True
    """Whether something turns a list of messages into text."""


def read_first_rows(flag: str, generalized_path: str) -> list[Row]:
    """The first rows of a file, or of its slice `file@[start:stop]`.

    Raises:
        ConfigError: no such file, a row that does not parse (with its line), or no rows at all.
    """
    path, start, stop = split_slice(flag, generalized_path)
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{flag} {path}: there is no such file (looked for {file.absolute()}); give an existing one")
    if file.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"{flag} {path}: is neither .jsonl nor .parquet; convert it to one object a line (.jsonl)")
    lines = _parquet_rows(flag, file) if file.suffix == ".parquet" else _json_lines(file)
    if (start or 0) < 0 or (stop or 0) < 0:
        total = sum(1 for _ in lines)
        lines = _parquet_rows(flag, file) if file.suffix == ".parquet" else _json_lines(file)
        start, stop, _ = slice(start, stop).indices(total)
    stop_at = (start or 0) + NUM_ROWS if stop is None else min(stop, (start or 0) + NUM_ROWS)
    rows = [_parsed(flag, file, number, line) for number, line in islice(lines, start or 0, max(stop_at, start or 0))]
    if not rows:
        raise ConfigError(f"{flag} {generalized_path}: holds no rows; give a file with rows, or another slice")
    return rows


def split_slice(flag: str, generalized_path: str) -> tuple[str, int | None, int | None]:
    """`file@[start:stop]` in its parts; both bounds are None without a slice."""
    if "@[" not in generalized_path:
        return generalized_path, None, None
    match = _SLICE.fullmatch(generalized_path)
    if match is None:
        raise ConfigError(f"{flag} {generalized_path}: the slice is not understood; type file@[0:100] or file@[-50:]")
    start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return match["path"], start, stop


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line


def _parquet_rows(flag: str, file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(f"{flag} {file}: reading parquet needs the package pyarrow; pip install pyarrow") from None
    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=NUM_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _parsed(flag: str, file: Path, number: int, line: Any) -> Row:
    where = f"{file}:{number}"
    if isinstance(line, bytes):
        try:
            line = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{flag}: {where}: the row is not JSON ({error}); correct or remove that line") from None
    if not isinstance(line, Mapping):
        raise ConfigError(f'{flag}: {where}: the row is {line!r}, not an object; write {{"prompt": ..., "label": ...}}')
    return Row(where, line)


def check_rows(rows: list[Row], expected: Expected) -> None:
    """Every row has its prompt (text or messages), and its answer where one is asked for.

    Raises:
        ConfigError: the first row that does not.
    """
    for row in rows:
        _check_prompt(row, expected)
        _check_label(row, expected)
        _check_extras(row, expected)


def _check_prompt(row: Row, expected: Expected) -> None:
    key, flag = expected.input_key, expected.flag
    if key not in row.values:
        near = did_you_mean(key, list(row.values))
        raise ConfigError(
            f"{flag}: {row.where}: the row has no field {key!r} (--input-key); it has {_names(row)}.{near} "
            f"Type --input-key {next(iter(row.values), 'NAME')}"
        )
    prompt = row.values[key]
    if isinstance(prompt, str):
        return
    if not (isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt)):
        raise ConfigError(
            f"{flag}: {row.where}: the prompt ({key!r}) is {_short(prompt)}; it must be text or a list of messages "
            'like [{"role": "user", "content": "2 + 2?"}]'
        )
    if not expected.renders_chats:
        raise ConfigError(
            f"{flag}: {row.where}: the prompt ({key!r}) is a list of messages; add --apply-chat-template to turn it "
            "into text"
        )


def _check_label(row: Row, expected: Expected) -> None:
    key = expected.label_key
    if key is None and expected.needs_label is not None:
        raise ConfigError(
            f"{expected.flag}: {row.where}: the reward {expected.needs_label} compares with an answer, but --label-key "
            f"is not given and the row has no field 'label'; it has {_names(row)}. Type --label-key NAME"
        )
    if key is not None and key not in row.values:
        raise ConfigError(
            f"{expected.flag}: {row.where}: the row has no field {key!r} (--label-key); it has {_names(row)}."
            f"{did_you_mean(key, list(row.values))}"
        )


def _check_extras(row: Row, expected: Expected) -> None:
    metadata = row.values.get(expected.metadata_key)
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ConfigError(
            f"{expected.flag}: {row.where}: {expected.metadata_key!r} (--metadata-key) is {_short(metadata)}, not an "
            'object; write {"name": value}, or name another field'
        )
    for field in (expected.multimodal_keys or {}).values():
        if field not in row.values:
            raise ConfigError(
                f"{expected.flag}: {row.where}: the row has no field {field!r} (--multimodal-keys); "
                f"it has {_names(row)}"
            )
    tools = row.values.get(expected.tool_key) if expected.tool_key else None
    if isinstance(tools, str):
        try:
            json.loads(tools)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{expected.flag}: {row.where}: {expected.tool_key!r} (--tool-key) is not JSON ({error}); correct it"
            ) from None


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _names(row: Row) -> str:
    return ", ".join(repr(name) for name in row.values) or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
