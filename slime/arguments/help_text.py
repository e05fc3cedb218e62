"""The texts of `--help` and `--help-all`."""

import textwrap

from slime.arguments.megatron_check import built_words
from slime.arguments.parser import table_flags
from slime.config.flags import Flag, group_title, with_help
from slime.config.groups import GROUPS
from slime.config.rules.required import EXAMPLE
from slime.config.unbuilt import unbuilt_words

WIDTH = 110
TITLES = {
    "megatron": "Megatron (model, parallelism, optimizer, precision, checkpoints)",
    "sglang": "SGLang's server arguments, with --sglang- in front",
    "router": "sglang-router's arguments, with --router- in front",
}


def help_text(program: str, *, everything: bool) -> str:
    """slime's flags in full, and the other projects' by name or, with `everything`, in full too."""
    lines = [
        f"usage: {program} --flag value ...",
        "",
        f"For example: {EXAMPLE.replace('train.py', program, 1)}",
        "--dry-run prints the plan and starts nothing. A flag that does not exist is an error.",
        "",
    ]
    for group in GROUPS.values():
        lines += [group_title(group), *(line for flag in with_help(group) for line in describe(flag)), ""]
    for name, flags in table_flags().items():
        lines.append(f"{TITLES[name]}: {len(flags)} flags")
        if everything:
            lines += [line for flag in flags for line in describe(flag)]
        else:
            names = "  ".join(flag.names[0] for flag in flags)
            lines += textwrap.wrap(
                names,
                WIDTH,
                initial_indent="  ",
                subsequent_indent="  ",
                break_on_hyphens=False,
                break_long_words=False,
            )
        lines.append("")
    if not everything:
        lines.append("--help-all explains these too; docs/flags.md has all of them.")
    return "\n".join(lines)


def describe(flag: Flag) -> list[str]:
    """A flag, what it takes and its default, and its text."""
    head = f"  {', '.join(flag.names)} {value_words(flag)}".rstrip()
    text = with_state(flag.help, flag) + default_words(flag)
    return [head, *textwrap.wrap(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def with_state(text: str, flag: Flag) -> str:
    """A flag's text and what of the flag is refused because it is not built yet."""
    is_megatrons = flag.dest in {other.dest for other in table_flags()["megatron"]}
    state = unbuilt_words(flag) or (built_words(flag) if is_megatrons else "")
    return text.rstrip(".") + "." + state if state else text


def value_words(flag: Flag) -> str:
    """What is typed after the flag: nothing for a switch."""
    if flag.kind == "on_or_off":
        return "| --no-" + flag.names[0].removeprefix("--")
    if flag.is_switch:
        return ""
    if flag.kind == "json":
        return "JSON"
    word = "{" + ",".join(str(c) for c in flag.choices) + "}" if flag.choices else _TYPE_WORDS[flag.value_type]
    return f"{word} ..." if flag.nargs in ("+", "*") else word


_TYPE_WORDS = {
    "int": "N",
    "float": "X",
    "str": "TEXT",
    "json": "JSON",
    "human_int": "N",
    "list_expression": "N|LIST",
    "nullable_str": "TEXT",
}


def default_words(flag: Flag) -> str:
    """` (default: ...)` where the default is a plain value that the text does not mention."""
    if flag.is_switch and flag.kind != "on_or_off":
        return ""
    if flag.default is None or flag.default in ([], {}) or "Default:" in flag.help:
        return ""
    default = " ".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    return f" (default: {'on' if default is True else 'off' if default is False else default})"
