"""Writes and checks the tables of Megatron's, SGLang's and the router's flags, from the source of their packages.

    python tools/generate_flag_tables.py --write     writes slime/arguments/tables/*.json
    python tools/generate_flag_tables.py --check     compares, shows a diff and exits 1 if they differ

A package whose source is not installed is reported; its table is then neither written nor checked (exit code 3).
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

from flag_tables import megatron, router, sglang

TABLES = Path(__file__).resolve().parent.parent / "slime" / "arguments" / "tables"
VERSIONS = {"megatron": "megatron_core", "sglang": "sglang", "router": "sglang_router"}


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=sorted(VERSIONS), nargs="+", default=sorted(VERSIONS))
    for name, package in (("megatron", "megatron.core"), ("sglang", "sglang"), ("router", "sglang_router")):
        parser.add_argument(f"--{name}-source", type=Path, help=f"folder of the package {package}")
    args = parser.parse_args()
    readers = {"megatron": megatron.rows, "sglang": sglang.rows, "router": router.rows}
    code = 0
    for name in args.only:
        try:
            text = as_text(readers[name](getattr(args, f"{name}_source")))
        except FileNotFoundError as missing:
            print(f"{name}: not compared: {missing}", file=sys.stderr)
            code = code or 3
            continue
        path = TABLES / f"{name}.json"
        if args.write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {text.count(chr(10)) - 2} flags -> {path.name}")
        elif difference := _diff(path, text):
            print(f"{name}: the table differs from the package:\n{difference}", file=sys.stderr)
            code = 1
        else:
            print(f"{name}: {text.count(chr(10)) - 2} flags, as in the package")
    return code


def as_text(rows: list[dict[str, Any]]) -> str:
    """One row a line, so that a diff shows the flag that changed."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def _diff(path: Path, text: str) -> str:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return "\n".join(difflib.unified_diff(old, text.splitlines(), path.name, "package", lineterm="", n=0))


if __name__ == "__main__":
    sys.exit(main())
