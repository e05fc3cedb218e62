"""Whether a function in source can be called the way slime will call it."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

Function = ast.FunctionDef | ast.AsyncFunctionDef

# Decorators that leave the way a function is called as it is.
_TRANSPARENT = {"trace_function", "no_grad", "inference_mode", "cache", "lru_cache", "staticmethod", "override"}


@dataclass(frozen=True)
class Signature:
    """Parameters of a function; `self` is left out for methods."""

    positional: tuple[str, ...]
    num_required: int
    keyword_only: tuple[str, ...]
    required_keywords: tuple[str, ...]
    takes_more_positional: bool
    takes_more_keywords: bool

    def takes_keyword(self, name: str) -> bool:
        """Whether `name=...` may be passed."""
        return name in self.positional or name in self.keyword_only or self.takes_more_keywords

    def problem_of_call(self, positional: Iterable[str], keywords: Iterable[str] = ()) -> str | None:
        """Why a call with these arguments fails, in words; None if it does not.

        Args:
            positional: what slime passes by position, by its own names.
            keywords: what it passes by name.
        """
        passed, named = tuple(positional), tuple(keywords)
        if len(passed) > len(self.positional) and not self.takes_more_positional:
            return f"takes {len(self.positional)} arguments, but is called with {len(passed)}"
        left = self.positional[len(passed) :]
        missing = [n for n in self.positional[len(passed) : self.num_required] if n not in named]
        missing += [n for n in self.required_keywords if n not in named]
        if missing:
            return f"asks for {', '.join(missing)}, which slime does not pass"
        unknown = [n for n in named if not (n in left or n in self.keyword_only or self.takes_more_keywords)]
        return f"does not take {', '.join(unknown)}" if unknown else None

    def __str__(self) -> str:
        parts = list(self.positional) + (["*"] if self.keyword_only else []) + list(self.keyword_only)
        return f"({', '.join(parts + (['**kwargs'] if self.takes_more_keywords else []))})"


def signature_of(function: Function, *, is_method: bool = False) -> Signature | None:
    """A function's parameters; None where a decorator may change them."""
    if not all(_decorator_name(d) in _TRANSPARENT for d in function.decorator_list):
        return None
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args)]
    required = len(names) - len(a.defaults)
    if is_method:
        names, required = names[1:], max(0, required - 1)
    return Signature(
        positional=tuple(names),
        num_required=required,
        keyword_only=tuple(p.arg for p in a.kwonlyargs),
        required_keywords=tuple(p.arg for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d is None),
        takes_more_positional=a.vararg is not None,
        takes_more_keywords=a.kwarg is not None,
    )


def method_of(class_def: ast.ClassDef, name: str) -> Function | None:
    """A method that the class itself defines."""
    for node in class_def.body:
        if isinstance(node, Function) and node.name == name:
            return node
    return None


def is_never_awaitable(function: Function) -> bool:
    """Whether a plain function surely returns something that `await` refuses: only literals, arithmetic or nothing."""
    if isinstance(function, ast.AsyncFunctionDef) or function.decorator_list:
        return False
    plain = ast.Constant | ast.BinOp | ast.Compare | ast.BoolOp | ast.UnaryOp | ast.List | ast.Dict | ast.IfExp
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
    return all(node.value is None or isinstance(node.value, plain) for node in returns)


def _decorator_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _decorator_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
