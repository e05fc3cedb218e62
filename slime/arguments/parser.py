"""One parser for slime's, Megatron's, SGLang's and the router's flags: no abbreviations, no ignored typing mistakes."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from slime.arguments.flag_tables import defaults_of, table
from slime.arguments.values import TYPES, json_mapping
from slime.config.errors import ConfigError, Problems, did_you_mean
from slime.config.flags import Flag, flags_of
from slime.config.groups import GROUPS

CustomArguments = Callable[[argparse.ArgumentParser], argparse.ArgumentParser | None]
TABLE_NAMES = ("megatron", "sglang", "router")


@dataclass
class CommandLine:
    """What one command line said.

    Attributes:
        values: dest -> value, for every known flag, defaults filled in.
        given: the dests that the command line set.
    """

    values: dict[str, Any]
    given: set[str]
    problems: Problems = field(default_factory=Problems)
    is_read: bool = True
    """False where a value could not be read, so that nothing is known of what was given."""


class FlagParser(argparse.ArgumentParser):
    """An argparse parser that raises `ConfigError` instead of ending the process, and never abbreviates."""

    def __init__(self) -> None:
        super().__init__(allow_abbrev=False, add_help=False, usage=argparse.SUPPRESS)
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+?)(/\S+)*:", r"\1:", message)
        flag = message.split(":")[0]
        if message.endswith(("expected one argument", "expected at least one argument")):
            message += f"; type a value after it: {flag} VALUE"
        elif "ignored explicit argument" in message:
            message += f"; it is a switch, type {flag} alone"
        raise ConfigError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(c) for c in action.choices]
            raise argparse.ArgumentError(
                action, f"{value!r} is not one of {', '.join(choices)}.{did_you_mean(str(value), choices)}"
            )


def slime_flags() -> tuple[Flag, ...]:
    """slime's own flags, in the order of their groups."""
    return tuple(flag for group in GROUPS.values() for flag in flags_of(group))


def table_flags() -> dict[str, tuple[Flag, ...]]:
    """The flags of the tables, without those that slime registers itself."""
    own = {name for flag in slime_flags() for name in flag.names}
    return {name: tuple(f for f in table(name) if not own & set(f.names)) for name in TABLE_NAMES}


def spellings(flags: Iterable[Flag]) -> set[str]:
    """Every option string of the flags, `--no-` forms included."""
    names = {name for flag in flags for name in flag.names}
    return names | {"--no-" + n.removeprefix("--") for f in flags if f.kind == "on_or_off" for n in f.names}


def reset_arg(parser: argparse.ArgumentParser, name: str, **kwargs: Any) -> None:
    """Add option `name`, or, where the parser already has it, replace its default only."""
    existing = parser._option_string_actions.get(name)
    if existing is None:
        parser.add_argument(name, **kwargs)
    elif "default" in kwargs:
        existing.default = kwargs["default"]


def add_flag(parser: argparse.ArgumentParser, flag: Flag, default: Any) -> None:
    """Register one flag; an option that is already there keeps its action and takes the new default."""
    if taken := [name for name in flag.names if name in parser._option_string_actions]:
        reset_arg(parser, taken[0], default=default)
        return
    parser.add_argument(*flag.names, dest=flag.dest, default=default, **_action(flag))


def _action(flag: Flag) -> dict[str, Any]:
    """argparse's words for a flag's kind."""
    match flag.kind:
        case "switch_on":
            return {"action": "store_true"}
        case "switch_off":
            return {"action": "store_false"}
        case "on_or_off":
            return {"action": argparse.BooleanOptionalAction}
        case "json":
            return {"type": json_mapping}
    words: dict[str, Any] = {"type": TYPES[flag.value_type], "choices": flag.choices}
    if flag.nargs is not None:
        words["nargs"] = int(flag.nargs) if flag.nargs.isdigit() else flag.nargs
    if flag.const is not None:
        words["const"] = flag.const
    if flag.kind in ("append", "extend"):
        words["action"] = flag.kind
    return words


def read_command_line(argv: Sequence[str], add_custom_arguments: CustomArguments | None = None) -> CommandLine:
    """Parse a command line, mistakes in it collected rather than raised.

    Only the tables' flags that occur in it are registered, which keeps the start fast.

    Args:
        argv: the words after the program's name.
        add_custom_arguments: adds a plug-in's own flags to the parser, before slime's.
    """
    problems = Problems()
    parser = FlagParser()
    if add_custom_arguments is not None:
        parser = _as_flag_parser(add_custom_arguments(parser), parser)
    own, tables = slime_flags(), table_flags()
    mentioned = {word.split("=", 1)[0] for word in argv if word.startswith("--")}
    known = list(own)
    for flag in own:
        add_flag(parser, flag, argparse.SUPPRESS)
    for flags in tables.values():
        known += flags
        for flag in flags:
            if mentioned & spellings([flag]):
                add_flag(parser, flag, argparse.SUPPRESS)
    all_names = spellings(known) | set(parser._option_string_actions) | {"--help", "--help-all"}
    given = argparse.Namespace()
    unknown = [w for w in argv if w.startswith("--") and w.split("=", 1)[0] not in all_names]
    is_read = False
    with problems.collected():
        given, unknown = parser.parse_known_args(list(argv))
        is_read = True
    problems.add(*_unknown_words(argv, unknown, all_names))
    values: dict[str, Any] = {}
    for flags in (tables["router"], tables["sglang"], tables["megatron"], own):
        values |= defaults_of(tuple(flags))
    custom = {a.dest for a in parser._actions} - {f.dest for f in known}
    values |= vars(given)
    _unwrap_single_values(known, given, values)
    return CommandLine(values, set(vars(given)) - custom, problems, is_read)


def _as_flag_parser(returned: argparse.ArgumentParser | None, made: FlagParser) -> FlagParser:
    if returned is None or returned is made:
        return made
    raise ConfigError(
        "add_custom_arguments returned another parser than the one it was given; add the flags to its argument "
        "and return that"
    )


def _unwrap_single_values(known: list[Flag], given: argparse.Namespace, values: dict[str, Any]) -> None:
    for flag in known:
        if flag.kind == "one_or_more" and hasattr(given, flag.dest) and len(values[flag.dest]) == 1:
            values[flag.dest] = values[flag.dest][0]


_SIZE = "An engine's tensor parallel size is --rollout-num-gpus-per-engine."
_ADDRESS = "The run chooses addresses and free ports for its servers."
_INSTEAD = {
    **dict.fromkeys(("--sglang-tp-size", "--sglang-tensor-parallel-size", "--sglang-tp"), _SIZE),
    **dict.fromkeys(("--sglang-port", "--sglang-nccl-port", "--sglang-dist-init-addr"), _ADDRESS),
    **dict.fromkeys(("--sglang-nnodes", "--sglang-node-rank"), "An engine has as many nodes as its devices fill: "
                    "--rollout-num-gpus-per-engine and --num-gpus-per-node."),
    **dict.fromkeys(("--sglang-base-gpu-id", "--sglang-gpu-id-step"), "Placement gives engines their devices."),
    "--sglang-model-path": "Engines load --hf-checkpoint.",
    "--sglang-random-seed": "The seed of engine i is --seed + i.",
    "--sglang-trust-remote-code": "It is --trust-remote-code, for trainer and engines.",
    "--sglang-enable-memory-saver": "Engines that give memory back have it: --colocate, --offload-rollout.",
    "--router-host": _ADDRESS,
    "--router-port": "A router that runs already is named by --sglang-router-ip and --sglang-router-port.",
}  # fmt: skip
"""Arguments of servers that slime sets itself, so that they are no flags: what decides them."""


def _unknown_words(argv: Sequence[str], unknown: Sequence[str], names: set[str]) -> list[str]:
    """One message for each flag that nobody knows, and one for words that belong to no flag."""
    messages, follows_unknown, stray = [], False, []
    left = list(unknown)
    for word in argv:
        if not left or word != left[0]:
            follows_unknown = False if word.startswith("--") else follows_unknown
            continue
        left.pop(0)
        name = word.split("=", 1)[0]
        if word.startswith("-") and not re.match(r"^-\d", word):
            follows_unknown = True
            known = _INSTEAD.get(name)
            near = did_you_mean(name, names) or " See --help and --help-all for the flags there are."
            messages.append(f"{name}: there is no such flag.{near if known is None else f' {known}'}")
        elif not follows_unknown:
            stray.append(word)
    if stray:
        messages.append(
            f"{' '.join(repr(w) for w in stray)}: belongs to no flag. Values follow their flag; "
            "quote a value that contains spaces, and write bash arrays as ${NAME[@]}"
        )
    return messages
