"""Types of flag values: each turns the text of one value into what `args` holds, or says what it should look like."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from slime.config.list_expressions import parse_list_expression

_HUMAN_UNITS = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2, "g": 1000**3, "G": 1024**3}


def integer(text: str) -> int:
    """A whole number; underscores are allowed."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; type one, like 8") from None


def number(text: str) -> float:
    """A number, like 0.001 or 1e-6."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; type one, like 0.001 or 1e-6") from None


def json_value(text: str) -> Any:
    """A JSON value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not JSON ({error.msg} at character {error.pos}); type for example \'{{"key": "value"}}\''
        ) from None


def json_mapping(text: str) -> dict[str, Any]:
    """A JSON mapping."""
    value = json_value(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f'{text!r} is JSON, but not a mapping; type for example \'{{"key": "value"}}\''
        )
    return value


def human_integer(text: str) -> int:
    """A whole number, or one with a unit: 8k (8,000), 8K (8,192), 1M."""
    try:
        if text[-1:] in _HUMAN_UNITS:
            return int(float(text[:-1]) * _HUMAN_UNITS[text[-1]])
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; type one, like 8192 or 8K") from None


def list_expression(text: str) -> int | list[int]:
    """A whole number or a list expression, like [0]*3+[1]*58."""
    try:
        return parse_list_expression(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def nullable_text(text: str) -> str | None:
    """Text, or nothing for `None` and the empty string."""
    return None if text in ("", "None") else text


TYPES: dict[str, Callable[[str], Any]] = {
    "int": integer,
    "float": number,
    "str": str,
    "json": json_value,
    "human_int": human_integer,
    "list_expression": list_expression,
    "nullable_str": nullable_text,
}
"""Name of a value type, as dataclasses and tables use it, and its reader."""
