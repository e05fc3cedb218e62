"""Which fields of a row hold prompt and answer when the command line does not say."""

from collections.abc import Mapping, Set
from typing import Any

from slime.config.groups import DataConfig


def guessed_keys(data: DataConfig, given: Set[str], first_row: Mapping[str, Any] | None) -> dict[str, str]:
    """`prompt` and `label`, where nothing was said and the first row has them."""
    row = first_row or {}
    keys = {}
    if "input_key" not in given and "prompt" in row:
        keys["input_key"] = "prompt"
    if "label_key" not in given and data.label_key is None and "label" in row:
        keys["label_key"] = "label"
    return keys
