"""Text in and out: the tokenizer, decoding token by token, and finding stop strings.

Text that ends in the middle of a character decodes to a replacement character; it is held back until the rest has come.
"""

from pathlib import Path
from typing import Any

UNFINISHED = "\ufffd"
"""What tokenizers give for the bytes of an incomplete character."""


class Codec:
    """The tokenizer of a served model; `end_tokens` are the ids that end a reply."""

    def __init__(self, path: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)

    @property
    def end_tokens(self) -> set[int]:
        """The tokenizer's own end token, if it has one."""
        token = self.tokenizer.eos_token_id
        return set() if token is None else {int(token)}

    def encode(self, text: str) -> list[int]:
        """Text to ids, with the special tokens that the tokenizer adds by itself."""
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, ids: list[int], *, skip_special: bool, spaces: bool = True) -> str:
        """Ids to text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special, spaces_between_special_tokens=spaces))

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        """Messages to ids with the model's chat template, ready for the assistant's reply."""
        out = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)
        return list(out)


def load_codec(path: str) -> Codec | None:
    """The tokenizer in a model folder, or None when the folder has none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((Path(path) / name).is_file() for name in names):
        return None
    return Codec(path)


class TextStream:
    """Decodes a growing list of ids without decoding all of it again.

    `text` is what is certain; `pending` follows it and may still change.
    """

    def __init__(self, codec: Codec, *, skip_special: bool, spaces: bool = True) -> None:
        self.codec, self.skip_special, self.spaces = codec, skip_special, spaces
        self.text = self.pending = ""
        self._context_start = self._read = 0

    def read(self, ids: list[int], count: int) -> None:
        """Take in the first `count` of `ids` (more than at the last call)."""
        known = self._decode(ids[self._context_start : self._read])
        new = self._decode(ids[self._context_start : count])[len(known) :]
        if new and not new.endswith(UNFINISHED):
            self.text += new
            self.pending = ""
            self._context_start, self._read = self._read, count
        else:
            self.pending = new

    @property
    def printable(self) -> str:
        """What may be shown while more is to come."""
        return self.text + self.pending.rstrip(UNFINISHED)

    def _decode(self, ids: list[int]) -> str:
        return self.codec.decode(ids, skip_special=self.skip_special, spaces=self.spaces) if ids else ""


class StopFinder:
    """Says which stop string a growing output contains; special tokens count as their text."""

    def __init__(self, codec: Codec, stops: tuple[str, ...]) -> None:
        self.stops = tuple(stop for stop in stops if stop)
        self._stream = TextStream(codec, skip_special=False)
        self._overlap = max((len(stop) for stop in self.stops), default=1) - 1

    def __call__(self, output: list[int]) -> str | None:
        searched = max(0, len(self._stream.text) - self._overlap)
        self._stream.read(output, len(output))
        text = self._stream.text[searched:] + self._stream.pending
        return next((stop for stop in self.stops if stop in text), None)


def without_beginning_stop(text: str, stops: tuple[str, ...]) -> str:
    """A growing text without an end that may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[:-length]
    return text


def trimmed(text: str, matched: int | str | None, *, keeps_stop: bool) -> str:
    """A finished text without what comes after its stop string, and without the stop string unless it is kept."""
    if not isinstance(matched, str) or (start := text.find(matched)) < 0:
        return text
    return text[: start + len(matched)] if keeps_stop else text[:start]
