"""Writes and checks the tables of Megatron's, SGLang's and the router's flags, from the source of their packages.

    python tools/generate_flag_tables.py --write     writes slime/arguments/tables/*.json
    python tools/generate_flag_tables.py --check     compares, shows a diff and exits 1 if they differ

The table of SGLang also holds what an older version alone has, so that its flags work too: a row's `only_in` names that
version. `--sglang-older` reads such a version; without it these rows stay as they are.

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
    parser.add_argument("--sglang-older", type=Path, help="folder of an older sglang, whose flags are kept too")
    args = parser.parse_args()
    readers = {"megatron": megatron.rows, "sglang": sglang.rows, "router": router.rows}
    code = 0
    for name in args.only:
        try:
            rows = readers[name](getattr(args, f"{name}_source"))
            text = as_text(with_older(rows, args.sglang_older) if name == "sglang" else rows)
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


def with_older(rows: list[dict[str, Any]], older: Path | None) -> list[dict[str, Any]]:
    """The rows of the newest SGLang, then those that only an older one has and does not call deprecated itself."""
    if older is None:
        table = json.loads((TABLES / "sglang.json").read_text(encoding="utf-8"))
        return rows + [row for row in table if "only_in" in row]
    version = (older / "_version.py").read_text(encoding="utf-8").split("__version__ = version = ")[1].split("'")[1]
    dests = {row["dest"] for row in rows}
    old = [row for row in sglang.rows(older) if row["dest"] not in dests]
    alive = [row for row in old if "deprecated" not in row["help"].lower() and not row["help"].startswith("See SGLang")]
    return rows + [row | {"only_in": version} for row in alive]


def as_text(rows: list[dict[str, Any]]) -> str:
    """One row a line, so that a diff shows the flag that changed."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def _diff(path: Path, text: str) -> str:
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return "\n".join(difflib.unified_diff(old, text.splitlines(), path.name, "package", lineterm="", n=0))


if __name__ == "__main__":
    sys.exit(main())
