"""SGLang's server arguments as flags `--sglang-...`, read from the wheel's source."""

import ast
from pathlib import Path
from typing import Any

from .source import Module, field_docs, package_dir, unwrap_optional

PACKAGE = "sglang"

# Arguments that slime sets itself: no flag. (The last line: spellings of the same.)
SKIPPED = {
    "model_path", "config", "trust_remote_code", "random_seed", "enable_memory_saver", "tp_size", "port", "nnodes",
    "node_rank", "dist_init_addr", "gpu_id_step", "base_gpu_id", "nccl_port", "skip_server_warmup",
    "enable_return_routed_experts",
}  # fmt: skip

# Of scripts for versions before these fields had their names; the server is given the new one.
OLDER_SPELLINGS = {"cuda_graph_bs_decode": "--cuda-graph-bs", "cuda_graph_max_bs_decode": "--cuda-graph-max-bs"}

TYPE_PARSERS = {
    "json.loads": "json",
    "json_list_type": "json",
    "human_readable_int": "human_int",
    "nullable_str": "nullable_str",
    "parse_cuda_graph_config_arg": "str",
    "parse_cuda_graph_backend_arg": "str",
}


def rows(folder: Path | None = None) -> list[dict[str, Any]]:
    """Every SGLang server argument as a row of the table, prefixed."""
    root = package_dir(PACKAGE, folder)
    server_args = Module(root, PACKAGE, "sglang.srt.server_args")
    table: dict[str, dict[str, Any]] = {}
    for module, class_def in _field_classes(root, server_args):
        docs = field_docs(class_def)
        for node in class_def.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                row = _row(module, node, node.target.id, docs, class_def.name)
                if row is not None:
                    table[row["dest"]] = row
    for row in _manual(server_args, table):
        table.setdefault(row["dest"], row)
    for dest, spelling in OLDER_SPELLINGS.items():
        if dest in table and spelling not in table[dest]["names"]:
            table[dest]["names"].append(spelling)
    return [_prefixed(row) for dest, row in table.items() if dest not in SKIPPED]


def _field_classes(root: Path, server_args: Module) -> list[tuple[Module, ast.ClassDef]]:
    """Where this version keeps its fields: namespaces under arg_groups/fields, or ServerArgs itself."""
    folder = root / "srt" / "arg_groups" / "fields"
    modules = [
        Module(root, PACKAGE, f"sglang.srt.arg_groups.fields.{path.stem}")
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__"
    ] or [server_args]
    return [(module, node) for module in modules for node in module.classes.values()]


def _row(module: Module, node: ast.AnnAssign, field: str, docs: dict[str, str], group: str) -> dict[str, Any] | None:
    match node.annotation:
        case ast.Subscript(value=ast.Name(id="A" | "Annotated"), slice=ast.Tuple(elts=[hint, meta, *_])):
            pass
        case _:
            return None
    arg = _arg(meta)
    if arg is None or module.value_or(arg.get("no_cli"), False):
        return None
    name = module.value_or(arg.get("cli_name")) or "--" + field.replace("_", "-")
    help_text = module.value_or(arg.get("help")) or docs.get(field, "")
    return {
        "names": [name, *(module.value_or(arg.get("aliases")) or [])],
        "dest": field,
        **_parsing(module, hint, arg),
        "default": _default(module, node.value),
        "help": " ".join(str(help_text).split()),
        "group": group,
    }


def _arg(meta: ast.expr) -> dict[str, ast.expr] | None:
    """Keywords of `Arg(...)`, or a bare help text; None for other annotations (derived fields)."""
    match meta:
        case ast.Call(func=ast.Name(id="Arg"), keywords=keywords):
            return {k.arg: k.value for k in keywords if k.arg}
        case ast.Call(func=ast.Name(id="Derived")):
            return None
    return {"help": meta}


def _parsing(module: Module, hint: ast.expr, arg: dict[str, ast.expr]) -> dict[str, Any]:
    inner = unwrap_optional(hint)
    action = ast.unparse(arg["action"]) if "action" in arg else ""
    if action.endswith("BooleanOptionalAction"):
        return {"action": "on_or_off"}
    if action == "LoRAPathAction":
        return {"action": "list", "type": "str", "nargs": "*"}
    row: dict[str, Any] = {"action": "value", "type": "str"}
    choices = module.value_or(arg.get("choices"))
    match inner:
        case ast.Subscript(value=ast.Name(id="Literal"), slice=literals):
            values = literals.elts if isinstance(literals, ast.Tuple) else [literals]
            choices = choices or [module.value(v) for v in values]
            row["type"] = type(choices[0]).__name__
        case ast.Subscript(value=ast.Name(id="List" | "list"), slice=element) if "type_parser" not in arg:
            row |= {"action": "list", "type": _scalar(element), "nargs": module.value_or(arg.get("nargs")) or "+"}
        case ast.Name(id="bool") if "type_parser" not in arg:
            return {"action": "switch_on"}
        case _:
            row["type"] = _scalar(inner)
    if "type_parser" in arg:
        row["type"] = TYPE_PARSERS[ast.unparse(arg["type_parser"])]
    if choices:
        row["choices"] = choices
    if row["action"] == "value" and (nargs := module.value_or(arg.get("nargs"))):
        row["nargs"] = nargs
    if (const := module.value_or(arg.get("const"))) is not None:
        row["const"] = const
    return row


def _scalar(hint: ast.expr) -> str:
    name = ast.unparse(hint)
    return name if name in ("int", "float") else "str"


def _default(module: Module, node: ast.expr | None) -> Any:
    if isinstance(node, ast.Call):  # msgspec.field(default_factory=list)
        factory = {k.arg: k.value for k in node.keywords}.get("default_factory")
        return {"list": [], "dict": {}}.get(ast.unparse(factory)) if factory else None
    return module.value_or(node)


def _manual(module: Module, table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Arguments that `ServerArgs.add_cli_args` registers by hand: dynamic choices and deprecated spellings."""
    method = next(
        node
        for node in module.classes["ServerArgs"].body
        if isinstance(node, ast.FunctionDef) and node.name == "add_cli_args"
    )
    rows = []
    for call in ast.walk(method):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "parser.add_argument"):
            continue
        keywords = {k.arg: k.value for k in call.keywords if k.arg}
        name = module.value(call.args[0])
        dest = module.value_or(keywords.get("dest")) or name.removeprefix("--").replace("-", "_")
        action = ast.unparse(keywords["action"]) if "action" in keywords else ""
        takes_value = not action or "nargs" in keywords
        default = table[dest]["default"] if dest in table else _declared(module, dest)
        help_text = module.value_or(keywords.get("help"))
        row = {
            "names": [module.value(a) for a in call.args],
            "dest": dest if takes_value and not action else name.removeprefix("--").replace("-", "_"),
            "action": "value" if takes_value else "switch_on",
            **({"type": "str"} if takes_value else {}),
            "default": default if not action else (None if takes_value else False),
            "help": " ".join((help_text or f"See SGLang's {name}.").split()),
            "group": "ServerArgs",
        }
        rows.append(row)
    return rows


def _declared(module: Module, dest: str) -> Any:
    for owner, class_def in _field_classes(module.root, module):
        for node in class_def.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == dest:
                return _default(owner, node.value)
    return None


def _prefixed(row: dict[str, Any]) -> dict[str, Any]:
    names = ["--sglang-" + name.removeprefix("--") for name in row["names"]]
    return row | {"names": names, "dest": "sglang_" + row["dest"]}
