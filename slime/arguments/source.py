"""Finds a function or class by the path that a flag gives, in source, without importing anything of the user's."""

import ast
import importlib.machinery
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slime.config.errors import ConfigError, did_you_mean

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_MAX_HOPS = 8  # re-exports that are followed


@dataclass(frozen=True)
class Found:
    """What a path names.

    Attributes:
        node: its definition; None where source does not show one (an assigned value, a compiled module).
        where: the file and the name, for errors.
    """

    node: Definition | None
    where: str
    file: Path | None = None


def find(flag: str, path: str, default_names: tuple[str, ...] = ()) -> Found:
    """What `package.module.name`, `file.py:name` or `file.py` names.

    Args:
        flag: as errors call it.
        default_names: tried in a bare `file.py`; then its own stem, then its only public function or class.

    Raises:
        ConfigError: there is no such module, file or name.
    """
    file_part, colon, name = path.rpartition(":")
    if colon and file_part.endswith(".py"):
        return _in_file(flag, path, _user_file(flag, path, file_part), name)
    if path.endswith(".py"):
        return _default_of_file(flag, path, default_names)
    module, dot, name = path.rpartition(".")
    if not dot or not module or not name:
        raise ConfigError(
            f"{flag} {path}: names no function; type package.module.name, file.py:name, or file.py with one function"
        )
    origin = _module_file(module)
    if origin is None:
        raise ConfigError(
            f"{flag} {path}: there is no module {module} on PYTHONPATH or in this folder; set PYTHONPATH to the folder "
            f"that holds it, or give the file: {module.rpartition('.')[2]}.py:{name}"
        )
    if not origin.endswith(".py"):
        return Found(None, f"{module}.{name}")
    return _in_file(flag, path, Path(origin), name)


def _user_file(flag: str, path: str, text: str) -> Path:
    file = Path(text).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"{flag} {path}: there is no file {text} (looked for {file.absolute()}); give its path from here"
        )
    return file


def _default_of_file(flag: str, path: str, default_names: tuple[str, ...]) -> Found:
    file = _user_file(flag, path, path)
    tree = parse(flag, file)
    own = [n.name for n in definitions(tree.body) if not n.name.startswith("_")]
    named = [name for name in (*default_names, file.stem) if name in own or name in _bound_names(tree)]
    # What a file imports is meant only if it defines nothing itself.
    candidates = [name for name in named if name in own or _imported_from(tree, name) is None]
    candidates += own if len(own) == 1 else []
    candidates += named if not own else []
    if candidates:
        return _in_file(flag, path, file, candidates[0])
    wanted = default_names[0] if default_names else file.stem
    raise ConfigError(
        f"{flag} {path}: does not say which function is meant; the file defines {', '.join(own) or 'none'}. "
        f"Type {path}:NAME, or call the function {wanted}"
    )


def _in_file(flag: str, path: str, file: Path, name: str, hops: int = 0) -> Found:
    tree = parse(flag, file)
    for node in definitions(tree.body):
        if node.name == name:
            return Found(node, f"{file.name}:{name} (line {node.lineno})", file)
    bound = _bound_names(tree)
    source = _imported_from(tree, name)
    if source is not None and hops < _MAX_HOPS:
        module, original = source
        origin = _module_file(module, beside=file)
        if origin and origin.endswith(".py"):
            return _in_file(flag, path, Path(origin), original, hops + 1)
        return Found(None, f"{file.name}:{name}", file)
    if name in bound or "*" in bound or "__getattr__" in [n.name for n in definitions(tree.body)]:
        return Found(None, f"{file.name}:{name}", file)
    own = [n.name for n in definitions(tree.body) if not n.name.startswith("_")]
    raise ConfigError(
        f"{flag} {path}: {file} has no {name}; it defines {', '.join(own) or 'nothing public'}."
        f"{did_you_mean(name, own)}"
    )


def parse(flag: str, file: Path) -> ast.Module:
    """The source of a file as a tree."""
    try:
        return ast.parse(file.read_text(encoding="utf-8"), str(file))
    except SyntaxError as error:
        raise ConfigError(
            f"{flag}: {file}, line {error.lineno}, is not Python: {error.msg}; correct that line"
        ) from None


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Functions and classes of a module, those under `if` and `try` too."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from definitions(node.body)
            yield from definitions(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from definitions(handler.body)


def _bound_names(tree: ast.Module) -> set[str]:
    """Names that a module binds by assignment or import."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _imported_from(tree: ast.Module, name: str) -> tuple[str, str] | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return "." * node.level + (node.module or ""), alias.name
    return None


def _module_file(module: str, beside: Path | None = None) -> str | None:
    """File of a module, found on sys.path and in the current folder as an import would, but without importing."""
    if module.startswith("."):
        return _relative_module(module, beside)
    places = [*([str(beside.parent)] if beside else []), *sys.path, "."]
    origin: str | None = None
    for part in module.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        if spec is None:
            return _without_file(module) if part == module.split(".")[0] else None
        origin = spec.origin
        places = list(spec.submodule_search_locations or [])
    return origin


def _relative_module(module: str, beside: Path | None) -> str | None:
    assert beside is not None, "relative imports occur in files only"
    level = len(module) - len(module.lstrip("."))
    folder = beside.parents[level - 1]
    parts = module.lstrip(".")
    target = folder.joinpath(*parts.split(".")) if parts else folder
    for candidate in (target.with_suffix(".py"), target / "__init__.py"):
        if candidate.is_file():
            return str(candidate)
    return None


def _without_file(module: str) -> str | None:
    """Modules that live in the interpreter itself."""
    return "built-in" if module.split(".")[0] in sys.builtin_module_names else None
