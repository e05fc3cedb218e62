"""`--sglang-*` and `--router-*` values back into the command lines of the programs that they belong to.

The tables of flags are data of the arguments room; they are read here as files, because an engine's launch needs of
them no more than the spelling, the kind and the default.
"""

import functools
import json
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import slime

_TABLES = Path(slime.__file__).parent / "arguments" / "tables"


def changed_flags(args: Namespace, program: str, *, without: Collection[str] = ()) -> list[str]:
    """Command-line words for every `args.<program>_*` that is neither None nor the default.

    Args:
        args: any flat namespace; attributes that are absent count as default.
        program: "sglang" or "router".
        without: dests left out because the caller sets them itself.
    """
    words: list[str] = []
    for dest, row in _table(program).items():
        value = getattr(args, dest, None)
        if dest in without or value is None or value == row["default"]:
            continue
        words += _words("--" + row["names"][0].removeprefix(f"--{program}-"), row["action"], value)
    return words


def is_changed(args: Namespace, program: str, dest: str) -> bool:
    """Whether the user gave `args.<dest>` a value other than the default."""
    value = getattr(args, dest, None)
    return value is not None and value != _table(program)[dest]["default"]


@functools.cache
def _table(program: str) -> dict[str, dict[str, Any]]:
    rows = json.loads((_TABLES / f"{program}.json").read_text(encoding="utf-8"))
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["dest"], row)
    return first


def _words(flag: str, kind: str, value: Any) -> list[str]:
    if kind in ("switch_on", "switch_off"):
        return [flag]
    if kind == "on_or_off":
        return [flag] if value else ["--no-" + flag.removeprefix("--")]
    if kind == "append":
        return [word for item in value for word in [flag, *map(str, item if isinstance(item, list) else [item])]]
    if kind in ("list", "extend", "one_or_more"):
        return [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
