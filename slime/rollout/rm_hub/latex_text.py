r"""Reads the LaTeX of short answers as plain text: `\frac{1}{2}` as `1/2`, `3\frac{1}{2}` as `(3+1/2)`, no units."""

import re
from decimal import Decimal
from functools import partial

_UNITS = (
    "degree|cm|centimeter|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard|liter|gram|dollar|cent"
)
SCALES = {"million": 10**6, "billion": 10**9, "trillion": 10**12}
FUNCTIONS = frozenset({
    "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "arcsin", "arccos", "arctan", "sinh",
    "cosh", "tanh", "log", "ln", "exp", "pi", "inf", "oo", "abs",
})  # fmt: skip
"""Names that SymPy is given as they are."""
NAMES = FUNCTIONS | {
    "and", "or", "max", "min", "mod", "gcd", "lcm", "frac", "begin", "end", "matrix", "pmatrix", "bmatrix", "vmatrix",
    "cases", "array", "theta", "alpha", "beta", "gamma",
}  # fmt: skip
"""Words that may stand in an answer without making it a sentence."""

_COMMANDS = {
    r"\cdot": "*", r"\times": "*", r"\div": "/", r"\pi": "pi", r"\infty": "inf", r"\cup": "∪", r"\pm": "pm",
    r"\{": "{", r"\}": "}", r"\le": "<=", r"\leq": "<=", r"\ge": ">=", r"\geq": ">=", r"\lt": "<", r"\gt": ">",
    r"\,": "", r"\;": "", r"\:": "", r"\!": "", r"\ ": " ", r"\quad": " ", r"\%": "", r"\$": "",
}  # fmt: skip
_SYMBOLS = {"√": "sqrt", "π": "pi", "∞": "inf", "·": "*", "×": "*", "−": "-", "–": "-", "÷": "/", "≤": "<="}
_COMMAND = re.compile(r"\\([a-zA-Z]+|.)", re.DOTALL)
_WORD = re.compile(r"[a-z]+")
_UNIT = re.compile(rf"(?<=[\d}}])\s*(\\text\{{|\\mathrm\{{)?\s*({_UNITS})(es|s)?\s*\}}?(\s*\^\s*\{{?\d\}}?)?\s*$")
MAX_NESTING = 30


def matching_brace(text: str, opening: int) -> int | None:
    """Index of the brace that closes the one at `opening`, or None."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}":
            depth -= 1
            if depth == 0:
                return index
    return None


def normalize_expression(text: str) -> str:
    """An answer as lower-case plain text without spaces, units and decoration; equal texts mean equal answers."""
    text = text.strip()
    if whole := re.fullmatch(r"\\text\{(.+)\}", text, re.DOTALL):
        text = whole.group(1)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("$", "").replace("%", "")
    text = re.sub(r"\s+(or|and)\s+", " , ", text)
    for word, scale in SCALES.items():
        text = re.sub(rf"(\d+(?:\.\d+)?)\s*(?:\\text\{{)?\s*{word}s?\s*\}}?", partial(_scaled, scale=scale), text)
    text = re.sub(r"\^\s*(\{\s*\\circ\s*\}|\\circ)", "", text).replace("°", "")
    text = _UNIT.sub("", text)
    if len(text) > 1 and text[0] == "{" and matching_brace(text, 0) == len(text) - 1:
        text = text[1:-1]
    text = latex_to_text(text)
    text = _join_thousands(text)
    text = re.sub(r"-\s*\+|\+\s*-", "-", text)
    text = re.sub(r"(?<![\d.])(-?)(\d+)\s+(\d+/\d+)", r"\1(\2+\3)", text)
    text = re.sub(r"\s+", "", text).lower().rstrip(".")
    return _plain_number(text)


def latex_to_text(text: str) -> str:
    """LaTeX commands as plain text; commands that are not known keep their name."""
    text = re.sub(r"\\[tdc]frac", r"\\frac", text)
    text = re.sub(r"\\(left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|,)(?![a-zA-Z])", "", text)
    text = re.sub(r"(\d)\s*\\frac", r"\1 \\frac", text)  # a mixed number
    text = _expand_fractions(text, 0)
    text = re.sub(r"\\(text|mathrm|mathbf|textbf|operatorname|mbox)\s*\{([^{}]*)\}", r" \2 ", text)
    text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"sqrt(\1)", text)
    text = _COMMAND.sub(_command, text)
    for symbol, plain in _SYMBOLS.items():
        text = text.replace(symbol, plain)
    return text


def is_words(text: str) -> bool:
    """Whether the text has a word that is no mathematical name: three letters or more in a row."""
    words = _WORD.findall(re.sub(r"\\[a-zA-Z]+", " ", text.lower()))
    return any(len(word) > 2 and not _is_made_of_names(word) for word in words)


def _is_made_of_names(word: str) -> bool:
    """Whether a run of letters is known names with at most two single letters between, as in `xsinx`."""
    rest = word
    for name in sorted(NAMES, key=len, reverse=True):
        rest = rest.replace(name, "")
    return rest != word and len(rest) <= 2


def _command(match: re.Match[str]) -> str:
    whole, name = match.group(0), match.group(1)
    return _COMMANDS.get(whole, f" {name} " if name in FUNCTIONS else whole)


def _scaled(match: re.Match[str], scale: int) -> str:
    value = Decimal(match.group(1)) * scale
    return f"{value.normalize():f}"


def _expand_fractions(text: str, depth: int) -> str:
    r"""Every `\frac{a}{b}` as `a/b`, with parentheses where a or b is not a single number or letter."""
    start = text.find("\\frac")
    if start < 0 or depth > MAX_NESTING:
        return text
    first = _argument(text, start + len("\\frac"))
    second = _argument(text, first[1]) if first else None
    if not first or not second:
        return text[: start + 5].replace("\\frac", " frac") + _expand_fractions(text[start + 5 :], depth + 1)
    a, b = (_expand_fractions(part, depth + 1) for part in (first[0], second[0]))
    return f"{text[:start]}{_grouped(a)}/{_grouped(b)}" + _expand_fractions(text[second[1] :], depth + 1)


def _argument(text: str, start: int) -> tuple[str, int] | None:
    """A LaTeX argument at `start`, braced or one character, and the index after it."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text):
        return None
    if text[start] != "{":
        return (text[start], start + 1) if text[start].isalnum() else None
    closing = matching_brace(text, start)
    return None if closing is None else (text[start + 1 : closing], closing + 1)


def _grouped(text: str) -> str:
    text = text.strip()
    return text if re.fullmatch(r"-?\d+(\.\d+)?|[a-zA-Z]", text) else f"({text})"


def _join_thousands(text: str) -> str:
    """`1,000,000` as `1000000`; commas that separate elements stay."""
    text = text.replace("{,}", ",").replace(",\\!", ",")
    pattern = re.compile(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?![\d,])")
    return pattern.sub(lambda match: match.group(1) + match.group(2).replace(",", ""), text)


def _plain_number(text: str) -> str:
    """`+5`, `05` and `5.0` as `5`; what is no number stays."""
    if re.fullmatch(r"[+-]?\d+(\.0*)?", text):
        return str(int(text.split(".")[0]))
    if re.fullmatch(r"[+-]?\.\d+", text):
        return text.replace(".", "0.", 1).lstrip("+")
    return text
