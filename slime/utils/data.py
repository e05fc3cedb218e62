"""Prompt files: JSONL and parquet rows become samples; a row that cannot be used is an error that names its line."""

import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from slime.utils.processing_utils import build_processor_kwargs, process_vision_info
from slime.utils.types import MultimodalTypes, Sample

logger = logging.getLogger(__name__)

_SLICED_PATH = re.compile(r"^(?P<path>.*)@\[(?P<start>(?:-?\d+)?):(?P<end>(?:-?\d+)?)\]$")


class DataError(ValueError):
    """A prompt file, or a row of one, that cannot be used."""


class PlaceholderError(DataError, AssertionError):
    """A prompt with more or fewer placeholders than there are images, videos or sounds for them."""


@dataclass(frozen=True)
class Row:
    """One row of a prompt file and where it stands."""

    where: str  # "train.jsonl, line 12"
    data: dict[str, Any]


def read_file(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a `.jsonl` or `.parquet` file; `path@[a:b]` gives a slice of them, negative ends count from the end.

    Raises:
        DataError: a row that is no JSON object, with file and line.
        FileNotFoundError: no such file.
    """
    return (row.data for row in read_rows(path))


def read_rows(path: str) -> Iterator[Row]:
    """As `read_file`, each row with its place. Empty lines are no rows."""
    file, rows = _parse_generalized_path(path)
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no prompt file {file!r} (looked for {Path(file).absolute()}).")
    if file.endswith(".jsonl"):
        return _read_jsonl(file, rows)
    if file.endswith(".parquet"):
        return _read_parquet(file, rows)
    raise DataError(f"{file!r} is neither .jsonl nor .parquet; these are the two kinds of prompt file.")


def _parse_generalized_path(path: str) -> tuple[str, slice | None]:
    """`file@[a:b]` -> (file, slice(a, b)); (path, None) without a slice."""
    match = _SLICED_PATH.match(path)
    if match is None:
        return path, None
    start, end = (int(text) if text else None for text in match.group("start", "end"))
    return match["path"], slice(start, end)


def _read_jsonl(file: str, rows: slice | None) -> Iterator[Row]:
    start, end = _bounds(rows, lambda: sum(1 for _ in _lines(file)))
    for number, line in islice(_lines(file), start, end):
        where = f"{file}, line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:  # json.JSONDecodeError and UnicodeDecodeError
            shown = line[:80].decode("utf-8", "replace")
            raise DataError(f"{where}: not JSON ({error}). The line starts with {shown!r}.") from None
        if not isinstance(data, dict):
            raise DataError(f'{where}: a row must be a JSON object like {{"prompt": ...}}, not {_shown(data)}.')
        yield Row(where, data)


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _read_parquet(file: str, rows: slice | None) -> Iterator[Row]:
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except Exception as error:
        raise DataError(f"{file}: not a parquet file ({error}).") from error
    with table:
        start, end = _bounds(rows, lambda: int(table.metadata.num_rows))
        number = 0
        for batch in table.iter_batches():
            first, number = number, number + batch.num_rows
            if number <= start:
                continue
            if end is not None and first >= end:
                return
            for offset, data in enumerate(batch.to_pylist()):
                if start <= first + offset and (end is None or first + offset < end):
                    yield Row(f"{file}, row {first + offset + 1}", data)


def _bounds(rows: slice | None, count: Any) -> tuple[int, int | None]:
    """First row and the row after the last one; `count()` is asked only for ends that count from the end."""
    if rows is None:
        return 0, None
    if (rows.start or 0) >= 0 and (rows.stop is None or rows.stop >= 0):
        start = rows.start or 0
        return start, None if rows.stop is None else max(start, rows.stop)
    start, end, _ = rows.indices(count())
    return start, max(start, end)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:80] + '...'}"


@dataclass(frozen=True)
class RowReader:
    """How a row becomes a sample: which key holds what, and the chat template to put it in."""

    tokenizer: Any = None
    processor: Any = None
    prompt_key: str = "text"
    multimodal_keys: Mapping[str, str] | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = "metadata"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.apply_chat_template:
            return
        if self.tokenizer is None:
            raise ValueError("A chat template needs a tokenizer, and none was given.")
        if getattr(self.tokenizer, "chat_template", "") is None:
            raise ValueError(
                f"The tokenizer of {self.tokenizer.name_or_path!r} has no chat template. "
                "Leave out --apply-chat-template, or use a model that has one."
            )

    def sample(self, row: Row) -> Sample:
        """The sample of one row.

        Raises:
            DataError: a key is missing or holds something that it cannot, with file and line.
        """
        metadata = self._metadata(row)
        tools = self._tools(row)
        if tools is not None:
            metadata["tools"] = tools
        messages = self._prompt(row)
        multimodal_inputs = None
        if self.processor is not None and isinstance(messages, list):
            multimodal_inputs = process_vision_info(messages, self.processor)
            if not any(multimodal_inputs.values()):
                multimodal_inputs = None
        return Sample(
            prompt=self._render(row, messages, tools) if self.apply_chat_template else messages,
            label=self._value(row, self.label_key, "--label-key") if self.label_key is not None else None,
            metadata=metadata,
            multimodal_inputs=multimodal_inputs,
        )

    def _value(self, row: Row, key: str, flag: str) -> Any:
        if key not in row.data:
            raise DataError(f"{row.where}: no key {key!r} ({flag}). The row has: {', '.join(map(repr, row.data))}.")
        return row.data[key]

    def _metadata(self, row: Row) -> dict[str, Any]:
        if self.metadata_key is None:
            return {}
        value = _from_json_text(row.data.get(self.metadata_key))
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise DataError(
                f"{row.where}: {self.metadata_key!r} (--metadata-key) must be an object, not {_shown(value)}."
            )
        return dict(value)

    def _tools(self, row: Row) -> list[Any] | None:
        value = row.data.get(self.tool_key) if self.tool_key is not None else None
        value = _from_json_text(_plain(value))
        if value is None:
            return None
        if not isinstance(value, list):
            raise DataError(
                f"{row.where}: {self.tool_key!r} (--tool-key) must be a list of tools, not {_shown(value)}."
            )
        return value

    def _prompt(self, row: Row) -> str | list[dict[str, Any]]:
        prompt = _plain(self._value(row, self.prompt_key, "--input-key"))
        if isinstance(prompt, str):
            if not prompt:
                raise DataError(f"{row.where}: the prompt {self.prompt_key!r} is empty.")
            if not self.apply_chat_template and not self.multimodal_keys:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise DataError(
                f"{row.where}: the prompt {self.prompt_key!r} must be text or a list of messages, not {_shown(prompt)}."
            )
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise DataError(
                    f'{row.where}: a message must look like {{"role": "user", "content": ...}}, not {_shown(message)}.'
                )
        return _fill_placeholders(row, prompt, self.multimodal_keys) if self.multimodal_keys else prompt

    def _render(self, row: Row, messages: Any, tools: list[Any] | None) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                **(self.apply_chat_template_kwargs or {}),
            )
        except Exception as error:
            raise DataError(f"{row.where}: the chat template does not take this prompt: {error}") from error
        return str(text)


def _plain(value: Any) -> Any:
    """Lists instead of arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _from_json_text(value: Any) -> Any:
    """Parquet files often hold objects as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _fill_placeholders(
    row: Row, messages: list[dict[str, Any]], multimodal_keys: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Replace `<image>`, `<video>`, `<audio>` in string contents by the row's items, in order."""
    kinds, waiting = {}, {}
    for name, key in multimodal_keys.items():
        kind = MultimodalTypes.get(name)
        if kind is None:
            known = ", ".join(repr(k.name) for k in MultimodalTypes.all())
            raise DataError(f"--multimodal-keys names {name!r}; known kinds are {known}.")
        items = _plain(row.data.get(key))
        kinds[kind.placeholder] = kind
        waiting[kind.name] = list(items) if isinstance(items, list) else [] if items is None else [items]
    counts = {name: len(items) for name, items in waiting.items()}
    pattern = re.compile("(" + "|".join(re.escape(placeholder) for placeholder in kinds) + ")")
    filled = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": _content_items(row, pattern.split(content), kinds, waiting, counts)}
        filled.append(message)
    left = {name: items for name, items in waiting.items() if items}
    if left:
        name, items = next(iter(left.items()))
        raise PlaceholderError(
            f"{row.where}: {counts[name]} {name} items for {counts[name] - len(items)} placeholders "
            f"{MultimodalTypes.get(name).placeholder!r}."  # type: ignore[union-attr]
        )
    return filled


def _content_items(
    row: Row, parts: list[str], kinds: Mapping[str, Any], waiting: Mapping[str, list[Any]], counts: Mapping[str, int]
) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    for part in parts:
        if part not in kinds:
            if part:
                items.append({"type": "text", "text": part})
            continue
        name = kinds[part].name
        if not waiting[name]:
            raise PlaceholderError(f"{row.where}: more placeholders {part!r} than the {counts[name]} {name} items.")
        item = waiting[name].pop(0)
        items.append(item if isinstance(item, dict) and "type" in item else {"type": name, name: item})
    return items


class Dataset:
    """All samples of a prompt file, in the order of the file or of an epoch's shuffle.

    `rows[i]` is the row that `samples[i]` was read from, 0-based: counted after an `@[a:b]` slice was taken and without
    empty lines, and kept through shuffles and the length filter.
    """

    def __init__(
        self,
        path: str,
        tokenizer: Any,
        processor: Any,
        max_length: int | None,
        *,
        prompt_key: str = "text",
        multimodal_keys: Mapping[str, str] | None = None,
        label_key: str | None = None,
        tool_key: str | None = None,
        metadata_key: str | None = "metadata",
        seed: int = 42,
        apply_chat_template: bool = False,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the whole file.

        Args:
            max_length: prompts of more tokens are left out and counted in the log; None keeps all.
            seed: of the shuffles, together with the epoch.

        Raises:
            DataError: a row that cannot be used, with file and line; or no row at all.
        """
        reader = RowReader(
            tokenizer,
            processor,
            prompt_key,
            multimodal_keys,
            label_key,
            tool_key,
            metadata_key,
            apply_chat_template,
            apply_chat_template_kwargs,
        )
        samples = [reader.sample(row) for row in read_rows(path)]
        if not samples:
            raise DataError(f"{path}: no rows.")
        row_of = {id(sample): row for row, sample in enumerate(samples)}
        if max_length is not None:
            everything = samples  # keeps the ids above those of living objects
            samples = filter_long_prompt(everything, tokenizer, processor, max_length)
            if not samples:
                raise DataError(
                    f"{path}: every prompt has more than {max_length} tokens. Raise --rollout-max-prompt-len (for "
                    "evaluation --eval-max-prompt-len)."
                )
        self.origin_samples = self.samples = samples
        self.origin_rows = self.rows = [row_of[id(sample)] for sample in samples]
        self.seed = seed
        self.epoch_id = -1
        self.num_drawn = 0

    def shuffle(self, epoch_id: int) -> None:
        """Put the samples in the order of `epoch_id`: the same for the same seed and epoch, whatever came before."""
        if self.epoch_id == epoch_id:
            return
        order = list(range(len(self.origin_samples)))
        random.Random(self.seed + epoch_id).shuffle(order)
        self.samples = [self.origin_samples[i] for i in order]
        self.rows = [self.origin_rows[i] for i in order]
        self.epoch_id = epoch_id

    def sample(self, num_samples: int) -> list[Sample]:
        """The next `num_samples` prompts as copies, starting over at the end of the file."""
        first = self.num_drawn
        self.num_drawn += num_samples
        return [deepcopy(self.samples[i % len(self)]) for i in range(first, self.num_drawn)]

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def filter_long_prompt(
    samples: Sequence[Sample], tokenizer: Any, processor: Any, max_length: int | None
) -> list[Sample]:
    """The samples whose prompt has at most `max_length` tokens, in order. Prompts that are message lists stay."""
    if max_length is None:
        return list(samples)
    lengths = _prompt_lengths(samples, tokenizer, processor)
    unknown = sum(length is None for length in lengths)
    if unknown:
        logger.warning("%d prompts are message lists without a chat template; their length is not checked", unknown)
    kept = [sample for sample, length in zip(samples, lengths, strict=True) if length is None or length <= max_length]
    if len(kept) < len(samples):
        logger.info(
            "%d of %d prompts have more than %d tokens and are left out",
            len(samples) - len(kept),
            len(samples),
            max_length,
        )
    return kept


def _prompt_lengths(samples: Sequence[Sample], tokenizer: Any, processor: Any) -> list[int | None]:
    """Tokens per prompt; None where the prompt is a message list."""
    lengths: list[int | None] = [None] * len(samples)
    plain = []
    for i, sample in enumerate(samples):
        if not isinstance(sample.prompt, str):
            continue
        if processor is not None and sample.multimodal_inputs:
            inputs = processor(text=sample.prompt, **build_processor_kwargs(sample.multimodal_inputs))
            lengths[i] = len(inputs["input_ids"][0])
        else:
            plain.append(i)
    if plain:
        encoded = tokenizer([samples[i].prompt for i in plain], add_special_tokens=False)["input_ids"]
        for i, ids in zip(plain, encoded, strict=True):
            lengths[i] = len(ids)
    return lengths


def get_source(sample: Sample) -> str:
    """Where a sample's prompt came from, for metrics by source."""
    return str(getattr(sample, "source", None) or (sample.metadata or {}).get("source_name") or "unknown")
