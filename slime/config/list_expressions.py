"""List expressions of launch scripts, like `[0]*3+[1]*58`: read by a small parser, never evaluated as code."""

import re

_TOKEN = re.compile(r"\s*(?:(\d+)|(.))")
_EXAMPLE = "type a whole number or a list like [1]*62 or [0]*3+[1]*58"


def parse_list_expression(text: str) -> int | list[int]:
    """Value of `expression = term ("+" term)*`, `term = "(" expression ")" | list ("*" number)*`, or of one number.

    Raises:
        ValueError: the text is neither; says at which character.
    """
    if re.fullmatch(r"\s*-?\d+\s*", text):
        return int(text)
    reader = _Reader(text)
    value = reader.expression()
    if reader.token is not None:
        raise reader.error()
    return value


class _Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.token: str | None = None
        self.advance()

    def advance(self) -> None:
        self.start = self.position
        match = _TOKEN.match(self.text, self.position)
        self.token = (match.group(1) or match.group(2)) if match else None
        self.position = match.end() if match else len(self.text)

    def expect(self, token: str) -> None:
        if self.token != token:
            raise self.error()
        self.advance()

    def error(self) -> ValueError:
        return ValueError(f"{self.text!r} is not a list expression (at character {self.start}); {_EXAMPLE}")

    def number(self) -> int:
        if self.token is None or not self.token.isdigit():
            raise self.error()
        value = int(self.token)
        self.advance()
        return value

    def expression(self) -> list[int]:
        value = self.term()
        while self.token == "+":
            self.advance()
            value = value + self.term()
        return value

    def term(self) -> list[int]:
        if self.token == "(":
            self.advance()
            value = self.expression()
            self.expect(")")
        else:
            value = self.items()
        while self.token == "*":
            self.advance()
            count = self.number()
            if len(value) * count > 100_000:
                raise self.error()
            value = value * count
        return value

    def items(self) -> list[int]:
        self.expect("[")
        values: list[int] = []
        while self.token != "]":
            values.append(self.number())
            if self.token != "]":
                self.expect(",")
        self.advance()
        return values
