"""Reads constants, classes and annotations from the source of an installed package, without importing it."""

import ast
import importlib.machinery
import sys
from functools import cached_property
from pathlib import Path
from typing import Any


class Unknown(Exception):
    """An expression that source alone does not decide."""


def package_dir(name: str, folder: Path | None = None) -> Path:
    """Folder of a package's source: `folder` if it holds it, else where the interpreter would find it.

    Raises:
        FileNotFoundError: the package is not installed here.
    """
    places = [str(folder), str(folder.parent)] if folder else sys.path
    for part in name.split("."):
        spec = importlib.machinery.PathFinder.find_spec(part, places)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"the source of {name} was not found in {folder or 'this Python environment'}")
        places = list(spec.submodule_search_locations)
    return Path(places[0])


class Module:
    """One source file of a package: its classes, and its names evaluated as far as literals go."""

    def __init__(self, root: Path, package: str, dotted: str) -> None:
        self.root, self.package, self.dotted = root, package, dotted
        relative = Path(*dotted.split(".")[len(package.split(".")) :])
        base = root / relative
        self.path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        self.tree = ast.parse(self.path.read_text(encoding="utf-8"))

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Top-level classes by name."""
        return {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}

    def other(self, dotted: str) -> "Module":
        """Another file of the same package."""
        return Module(self.root, self.package, dotted)

    @cached_property
    def _assigned(self) -> dict[str, ast.expr]:
        names: dict[str, ast.expr] = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign):
                names |= {t.id: node.value for t in node.targets if isinstance(t, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and node.value and isinstance(node.target, ast.Name):
                names[node.target.id] = node.value
        return names

    @cached_property
    def _imported(self) -> dict[str, tuple[str, str]]:
        return {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(self.package)
            for alias in node.names
        }

    def value(self, node: ast.expr) -> Any:
        """Value of a literal, a constant of the package, or a sum or list of these.

        Raises:
            Unknown: the expression needs more than that.
        """
        match node:
            case ast.Constant(value=value):
                return value
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [self.value(e) for e in elements]
            case ast.Set(elts=elements):
                return sorted(self.value(e) for e in elements)
            case ast.Dict(keys=[], values=[]):
                return {}
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=operator, right=right):
                return _combine(operator, self.value(left), self.value(right))
            case ast.Call(func=ast.Name(id="list" | "set" | "frozenset" | "sorted"), args=[only]):
                return sorted(self.value(only)) if _named(node) != "list" else list(self.value(only))
            case ast.Name(id=name):
                return self._named_value(name)
            case ast.Attribute(value=ast.Name(id=class_name), attr=attribute):
                return self._class_value(class_name, attribute)
        raise Unknown(ast.unparse(node))

    def _named_value(self, name: str) -> Any:
        if name in self._assigned:
            return self.value(self._assigned[name])
        if name in self._imported:
            dotted, original = self._imported[name]
            return self.other(dotted)._named_value(original)
        raise Unknown(name)

    def _class_value(self, class_name: str, attribute: str) -> Any:
        if class_name in self._imported and class_name not in self.classes:
            dotted, original = self._imported[class_name]
            return self.other(dotted)._class_value(original, attribute)
        if class_name not in self.classes:
            raise Unknown(f"{class_name}.{attribute}")
        body = self.classes[class_name].body
        known: dict[str, Any] = {}
        for node in body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                try:
                    known[node.targets[0].id] = self._with(known, node.value)
                except Unknown:
                    continue
        if attribute not in known:
            raise Unknown(f"{class_name}.{attribute}")
        return known[attribute]

    def _with(self, known: dict[str, Any], node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in known:
            return known[node.id]
        if isinstance(node, ast.Tuple | ast.List):
            return [self._with(known, e) for e in node.elts]
        return self.value(node)

    def value_or(self, node: ast.expr | None, otherwise: Any = None) -> Any:
        """`value`, or `otherwise` where source does not decide."""
        if node is None:
            return otherwise
        try:
            return self.value(node)
        except Unknown:
            return otherwise


def field_docs(class_def: ast.ClassDef) -> dict[str, str]:
    """The string literal under each annotated field."""
    docs = {}
    for statement, following in zip(class_def.body, class_def.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs


def unwrap_optional(annotation: ast.expr) -> ast.expr:
    """`X` out of `Optional[X]` or `X | None`."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return inner
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return left
    return annotation


def _named(call: ast.expr) -> str:
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    return call.func.id


def _combine(operator: ast.operator, left: Any, right: Any) -> Any:
    match operator:
        case ast.Add():
            return left + right
        case ast.Mult():
            return left * right
        case ast.Pow():
            return left**right
        case ast.Sub():
            return left - right
    raise Unknown(ast.dump(operator))
