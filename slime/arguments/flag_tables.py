"""The flags of Megatron, SGLang and the router, from the tables that tools/generate_flag_tables.py writes."""

import functools
import json
from pathlib import Path

from slime.config.flags import Flag

TABLES = Path(__file__).parent / "tables"


@functools.cache
def table(name: str) -> tuple[Flag, ...]:
    """The flags of one table: `megatron`, `sglang` or `router`."""
    rows = json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(
        Flag(
            names=tuple(row["names"]),
            dest=row["dest"],
            kind=row["action"],
            value_type=row.get("type", "str"),
            default=row["default"],
            choices=tuple(row["choices"]) if row.get("choices") else None,
            nargs=row.get("nargs"),
            help=row["help"],
            group=row["group"],
            fields=tuple(row.get("fields", ())),
            const=row.get("const"),
        )
        for row in rows
    )


def defaults_of(flags: tuple[Flag, ...]) -> dict[str, object]:
    """Default of every dest; lists are fresh copies."""
    return {
        f.dest: (list(f.default) if isinstance(f.default, list) else f.default)
        for f in reversed(flags)  # the first flag of a dest decides
    }
