"""sglang-router's arguments as flags `--router-...`, read from the wheel's source."""

import ast
import re
from pathlib import Path
from typing import Any

from .source import Module, package_dir

PACKAGE = "sglang_router"

# slime registers workers itself and binds the router itself.
SKIPPED = {"host", "port", "worker_urls"}
# What slime changes: calmer logs, and a balance that suits many short requests.
CHANGED_DEFAULTS = {"log_level": "warn", "balance_abs_threshold": 10, "balance_rel_threshold": 1.2}
# Policies that the router's Python RouterArgs takes but its own command line does not list.
EXTRA_POLICIES = ["consistent_hashing", "prefix_hash"]


def rows(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every router argument as a row of the table, prefixed."""
    root = package_dir(PACKAGE, folder)
    module = Module(root, PACKAGE, f"{PACKAGE}.router_args")
    class_def = module.classes["RouterArgs"]
    defaults = {
        node.target.id: node.value
        for node in class_def.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    method = next(n for n in class_def.body if isinstance(n, ast.FunctionDef) and n.name == "add_cli_args")
    groups = _group_titles(module, method)
    table = []
    for call in ast.walk(method):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            row = _row(module, call, defaults, groups)
            if row["dest"] not in SKIPPED:
                table.append(_prefixed(row))
    return sorted(table, key=lambda row: (list(groups.values()).index(row["group"]), row["dest"]))


def _row(
    module: Module, call: ast.Call, defaults: dict[str, ast.expr | None], groups: dict[str, str]
) -> dict[str, Any]:
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    names = [re.sub(r"^f?['\"]|['\"]$|\{prefix\}", "", ast.unparse(a)) for a in call.args]
    dest = names[0].removeprefix("--").replace("-", "_")
    action = module.value_or(keywords.get("action"))
    row: dict[str, Any] = {"names": names, "dest": dest, "group": groups[call.func.value.id]}  # type: ignore[attr-defined]
    if action == "store_true":
        row |= {"action": "switch_on", "default": False}
    else:
        nargs = module.value_or(keywords.get("nargs"))
        repeated = {"append": "append"}.get(action or "", "list" if nargs else "value")
        row |= {"action": repeated, "type": ast.unparse(keywords.get("type", ast.Name("str")))}
        row["default"] = _default(module, keywords.get("default"), defaults)
        row |= {"nargs": str(nargs)} if nargs else {}
    if choices := module.value_or(keywords.get("choices")):
        row["choices"] = choices + (EXTRA_POLICIES if dest.endswith("policy") else [])
    row["default"] = CHANGED_DEFAULTS.get(dest, row["default"])
    row["help"] = " ".join(str(module.value_or(keywords.get("help")) or "").split())
    return row


def _default(module: Module, node: ast.expr | None, defaults: dict[str, ast.expr | None]) -> Any:
    """A literal, or `RouterArgs.x`; an environment variable's default is the router's own business."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "RouterArgs":
        return module.value_or(defaults.get(node.attr))
    return module.value_or(node)


def _group_titles(module: Module, method: ast.FunctionDef) -> dict[str, str]:
    return {
        node.targets[0].id: module.value(node.value.args[0])
        for node in ast.walk(method)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == "parser.add_argument_group"
    }


def _prefixed(row: dict[str, Any]) -> dict[str, Any]:
    names = ["--router-" + name.removeprefix("--") for name in row["names"]]
    return row | {"names": names, "dest": "router_" + row["dest"]}
