"""Parses what a model wrote as an expression without running it.

SymPy's parser evaluates Python code, and its public names reach `sympify`, which does so with all builtins. Here an
expression may hold numbers, operators, parentheses, single letters and a few named functions; nothing else is parsed.
"""

import ast
import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

MAX_CHARS = 300
MAX_DIGITS = 100
MAX_SHIFT = 4096

_ALLOWED = re.compile(r"[0-9a-zA-Z+\-*/^().,\s]*")
_ATTRIBUTE = re.compile(r"\.\s*[a-zA-Z(]|[a-zA-Z)]\s*\.")
_NAME = re.compile(r"[a-zA-Z]+")
_TOWER = re.compile(r"\^\s*\d+\s*\^|\^\s*\d{4,}")
_SAME_NAMES = (
    "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "log", "ln",
    "exp", "pi", "oo", "E", "I", "factorial", "Abs",
)  # fmt: skip
_OTHER_NAMES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs", "inf": "oo"}
_PIECE = re.compile("|".join(sorted((*_SAME_NAMES, *_OTHER_NAMES), key=len, reverse=True)) + "|[a-zA-Z]")


class UnsafeExpression(ValueError):
    """The text is not an expression that may be parsed; the message says why."""


def check_expression(text: str) -> str:
    """The text with `^` for powers, if it may be parsed.

    Raises:
        UnsafeExpression: it is too long, or has characters, attributes or towers of powers that are not allowed.
    """
    if len(text) > MAX_CHARS:
        raise UnsafeExpression(f"longer than {MAX_CHARS} characters")
    if not _ALLOWED.fullmatch(text):
        raise UnsafeExpression("characters beyond numbers, letters and + - * / ^ ( ) . ,")
    text = re.sub(r"\*\s*\*", "^", text)
    if _ATTRIBUTE.search(text):
        raise UnsafeExpression("a dot that is no decimal point")
    if _TOWER.search(text) or any(len(digits) > MAX_DIGITS for digits in re.findall(r"\d+", text)):
        raise UnsafeExpression("numbers too large to compute")
    return text


def parse_expression(text: str, *, implicit_products: bool = True, symbols: dict[str, Any] | None = None) -> Any:
    """A SymPy expression.

    Args:
        implicit_products: `2x` and `xy` are products; without it they are errors or one symbol.
        symbols: further names, by value.

    Raises:
        UnsafeExpression: see `check_expression`; a longer name that is no known function is one too.
        Exception: whatever SymPy raises on text that is no expression.
    """
    from sympy.parsing import sympy_parser

    text = check_expression(text).replace("^", "**")
    steps: tuple[Any, ...] = sympy_parser.standard_transformations
    if implicit_products:
        text = _NAME.sub(_separated, text)
        steps = (*steps, sympy_parser.implicit_multiplication_application)
    names = {*_SAME_NAMES, *_OTHER_NAMES, *(symbols or {})}
    if unknown := [name for name in _NAME.findall(text) if len(name) > 1 and name not in names]:
        raise UnsafeExpression(f"the name {unknown[0]!r}")
    return sympy_parser.parse_expr(
        text, local_dict=dict(symbols or {}), global_dict=_namespace(), transformations=steps
    )


def evaluate_literal(text: str) -> Any:
    """A Python literal, or integer arithmetic of `+ - * << >> & | ^`: what some verifiers pass to `eval`.

    Raises:
        ValueError, SyntaxError: it is anything else.
    """
    if len(text) > 100_000:
        raise ValueError("longer than 100,000 characters")
    return _literal(ast.parse(text.strip(), mode="eval").body)


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.LShift: operator.lshift,
    ast.RShift: operator.rshift, ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
}  # fmt: skip


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _literal(node.left), _literal(node.right)
        if type(left) not in (int, float) or type(right) not in (int, float):
            raise ValueError("arithmetic on something else than numbers")
        if isinstance(node.op, ast.LShift | ast.RShift) and right > MAX_SHIFT:
            raise ValueError(f"a shift by more than {MAX_SHIFT}")
        return _BINARY[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        items = [_literal(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items) if isinstance(node, ast.Tuple) else set(items)
    return ast.literal_eval(node)


def _separated(match: re.Match[str]) -> str:
    """A run of letters as known names and single letters: `xsinx` is `x sin x`."""
    return f" {' '.join(_PIECE.findall(match.group(0)))} "


@cache
def _namespace() -> dict[str, Any]:
    """The names that parsed text can reach: the parser's own constructors and the functions above, no builtins."""
    import sympy

    constructors = ("Symbol", "Function", "Integer", "Float", "Rational")
    names = {name: getattr(sympy, name) for name in (*constructors, *_SAME_NAMES)}
    names |= {name: getattr(sympy, target) for name, target in _OTHER_NAMES.items()}
    return {**names, "__builtins__": {}}
