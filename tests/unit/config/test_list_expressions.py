"""List expressions are read by a small grammar; Python code is not run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.config.list_expressions import parse_list_expression


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("[0]*3+[1]*2", [0, 0, 0, 1, 1]),
        ("([0] + [1, 2]) * 2", [0, 1, 2, 0, 1, 2]),
        ("[]", []),
        ("[1]*2*2", [1, 1, 1, 1]),
        ("[7,]", [7]),
    ],
)
def test_the_value_is_pythons(text: str, value: int | list[int]) -> None:
    assert parse_list_expression(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "[0]*", "[0]+1", "1+1", "[0", "0]", "__import__('os')", "[0]**2", "[a]", "[0]*3 [1]", "[0]*99999999", "[-1]"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"type a whole number or a list like"):
        parse_list_expression(text)


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 5)), min_size=1, max_size=5))
def test_a_sum_of_repeated_lists_is_what_python_makes_of_it(terms: list[tuple[list[int], int]]) -> None:
    expected = [value for items, count in terms for value in items * count]
    assert parse_list_expression("+".join(f"{items}*{count}" for items, count in terms)) == expected
