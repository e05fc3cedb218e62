"""Where slime's flags, Megatron's and SGLang's meet: `parse_args()` gives the flat `args`, checked and complete.

Nothing here imports torch, Ray, transformers, Megatron or SGLang, so that a wrong command line costs no time.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from slime.arguments.build import build_args, validate
from slime.arguments.megatron_check import no_megatron_flag_is_ignored
from slime.arguments.overrides import parse_megatron_role_args
from slime.arguments.parser import CustomArguments, add_flag, reset_arg, slime_flags
from slime.arguments.start_check import checkpoints_are_whole
from slime.config import ConfigError, megatron_fields
from slime.config.errors import Problems
from slime.config.unbuilt import nothing_unbuilt_is_asked_for

__all__ = [
    "ConfigError",
    "build_args",
    "get_slime_extra_args_provider",
    "megatron_fields",
    "parse_args",
    "parse_megatron_role_args",
    "reset_arg",
    "slime_validate_args",
]


def parse_args(
    argv: Sequence[str] | CustomArguments | None = None,
    add_custom_arguments: CustomArguments | None = None,
    *,
    loop: Literal["sync", "async"] = "sync",
) -> Namespace:
    """The `args` of a run; ends the process after `--help` and `--dry-run` (0) and after an error (2).

    Args:
        argv: the words after the program's name; those of this process when not given. A callable here is taken as
            `add_custom_arguments`.
        add_custom_arguments: `fn(parser) -> parser` that adds a plug-in's own flags, before slime's.
        loop: which loop runs: train.py's (phases take turns) or train_async.py's (they run together).

    Returns:
        A flat, mutable namespace: every flag's attribute, derived values, `plan`, and `megatron_field_dests` (see
        `megatron_fields`).
    """
    if callable(argv):
        argv, add_custom_arguments = None, argv
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h", "--help-all"} & set(words):
        from slime.arguments.help_text import help_text

        _print(help_text(_program(), everything="--help-all" in words))
        sys.exit(0)
    try:
        args = build_args(words, add_custom_arguments, loop=loop)
        _refuse_what_would_do_nothing(args)
    except ConfigError as error:
        _stop(error)
    plan = args.plan
    if args.dry_run:
        _print(plan.as_text())
        sys.exit(0)
    choices = f"{plan.device.value} ({plan.device.reason}), {plan.engine.value} engine ({plan.engine.reason})"
    print(f"{_program()}: {choices}, {plan.dtype.value} ({plan.dtype.reason})", file=sys.stderr)
    for note in plan.notes:
        print(f"{_program()}: note: {note}", file=sys.stderr)
    return args


def slime_validate_args(args: Namespace) -> None:
    """Check a parsed namespace and complete it in place.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    validate(args)
    _refuse_what_would_do_nothing(args)


def get_slime_extra_args_provider(
    add_custom_arguments: CustomArguments | None = None,
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """A function that adds slime's flags, with their defaults, to any parser; options that the parser has keep their
    action and take slime's default."""

    def add_slime_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        if add_custom_arguments is not None:
            parser = add_custom_arguments(parser) or parser
        for flag in slime_flags():
            add_flag(parser, flag, flag.default)
        return parser

    return add_slime_arguments


def _refuse_what_would_do_nothing(args: Namespace) -> None:
    problems = Problems()
    problems.check_all((nothing_unbuilt_is_asked_for, no_megatron_flag_is_ignored, checkpoints_are_whole), args)
    problems.raise_if_any()


def _program() -> str:
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name if name.endswith(".py") and not name.startswith("__") else "train.py"


def _print(text: str) -> None:
    """To stdout, for a reader that may stop early (`--help | head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(error: ConfigError) -> NoReturn:
    """Say what is wrong, all of it, and end with exit code 2."""
    if len(error.messages) == 1:
        print(f"{_program()}: error: {error.messages[0]}", file=sys.stderr)
    else:
        print(f"{_program()}: error: {len(error.messages)} problems", file=sys.stderr)
        for number, message in enumerate(error.messages, 1):
            print(f"  {number}. {message}", file=sys.stderr)
    sys.exit(2)
