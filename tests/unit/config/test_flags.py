"""A dataclass field becomes one flag; the string under it is its help."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from slime.config.errors import did_you_mean
from slime.config.flags import flag, flags_of, group_title, help_texts, with_help
from slime.config.groups import GROUPS


@dataclass(frozen=True)
class Example:
    """Examples; more words."""

    count: int = 3
    """How
    many."""
    is_on: bool = False
    """Whether."""
    maybe: bool | None = None
    """Perhaps."""
    likes: bool = flag(True, names=("--dislikes",), kind="switch_off")
    """Not."""
    mode: Literal["a", "b"] = "a"
    """Which."""
    names: list[str] | None = None
    """Who."""
    extra: dict[str, Any] = flag({})
    """What else."""


@dataclass(frozen=True)
class Silent:
    """A field without help."""

    count: int = 3


def test_types_decide_how_a_flag_is_parsed() -> None:
    kinds = {item.dest: (item.kind, item.value_type, item.default) for item in flags_of(Example)}
    assert kinds == {
        "count": ("value", "int", 3),
        "is_on": ("switch_on", "str", False),
        "maybe": ("on_or_off", "str", None),
        "likes": ("switch_off", "str", True),
        "mode": ("value", "str", "a"),
        "names": ("list", "str", None),
        "extra": ("json", "str", {}),
    }


def test_names_are_the_fields_with_dashes_unless_said() -> None:
    assert [item.names[0] for item in flags_of(Example)] == [
        "--count", "--is-on", "--maybe", "--dislikes", "--mode", "--names", "--extra",
    ]  # fmt: skip


def test_the_string_under_a_field_is_its_help() -> None:
    assert with_help(Example)[0].help == "How many."


def test_a_field_without_help_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"Silent has fields without help text: \['count'\]"):
        help_texts(Silent)


def test_every_flag_of_slime_has_a_help_text() -> None:
    texts = [text for group in GROUPS.values() for text in help_texts(group).values()]
    assert len(texts) > 240
    assert all(text.endswith((".", ")")) for text in texts)


def test_a_mutable_default_is_not_shared() -> None:
    assert Example().extra is not Example().extra


def test_a_group_is_headed_by_its_docstring() -> None:
    assert group_title(Example) == "Examples; more words"


def test_a_suggestion_prefers_what_begins_like_the_word() -> None:
    known = {"--rollout-stop", "--rollout-top-p", "--rollout-temperature"}
    assert did_you_mean("--rollout-temp", known, limit=1) == " Did you mean --rollout-temperature?"
    assert did_you_mean("--xyz", known) == ""
