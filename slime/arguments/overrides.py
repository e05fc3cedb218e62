"""YAML files that change `args`: --custom-config-path for the whole run, --megatron-config-path for one role,
--sglang-config for groups of engines."""

import copy
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from slime.arguments.flag_tables import table
from slime.config.errors import ConfigError, Problems, did_you_mean
from slime.config.eval_datasets import read_yaml
from slime.config.flags import Flag

_ROLES = ("actor", "critic")
_NOT_OVERRIDDEN = ("num_nodes", "num_gpus_per_node")
_CRITIC = {
    "kl_coef": 0.0,
    "use_opd": False,
    "custom_advantage_function_path": None,
    "untie_embeddings_and_output_weights": True,
    "disable_param_buffers_cpu_backup": False,
}


def read_custom_config(path: str, values: Mapping[str, Any], flags: Iterable[Flag]) -> dict[str, Any]:
    """Entries of --custom-config-path, text that stands for a number turned into one.

    Args:
        values: what `args` has so far.
        flags: those whose values are checked; other names may hold anything.

    Raises:
        ConfigError: the file is missing or is not a mapping of names, or a flag cannot have its value.
    """
    flag = f"--custom-config-path {path}"
    entries = read_yaml(_text_of(flag, path), flag)
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(isinstance(k, str) and k.isidentifier() for k in entries):
        raise ConfigError(f"{flag}: is not a mapping of names; write lines like `max_turns: 5`")
    entries = {name: coerced(value, values.get(name)) for name, value in entries.items()}
    problems = Problems()
    for item in flags:
        if item.dest in entries and (problem := _problem_of_value(item, entries[item.dest])):
            problems.add(f"{flag}: {item.dest} is {entries[item.dest]!r}; {problem}")
    problems.raise_if_any()
    return entries


def _problem_of_value(flag: Flag, value: Any) -> str | None:
    """Why a flag cannot have this value, in words; None if it can, or if only the flag's own type would tell."""
    if value is None:
        return None
    if flag.is_switch:
        return None if isinstance(value, bool) else "it must be true or false"
    if flag.choices and flag.nargs is None and value not in flag.choices:
        near = did_you_mean(str(value), [str(c) for c in flag.choices])
        return f"it must be one of {', '.join(map(str, flag.choices))}.{near}"
    if flag.kind == "value" and flag.value_type in ("int", "float"):
        allowed = int if flag.value_type == "int" else int | float
        is_number = isinstance(value, allowed) and not isinstance(value, bool)
        return None if is_number else f"it must be a {'whole ' if flag.value_type == 'int' else ''}number"
    if flag.kind in ("list", "extend", "append") and not isinstance(value, list):
        return "it must be a list"
    return None


def coerced(value: Any, existing: Any) -> Any:
    """YAML reads 1e-5 as text: such text becomes a number where the existing value is one."""
    if isinstance(value, str) and isinstance(existing, int | float) and not isinstance(existing, bool):
        try:
            return type(existing)(value)
        except ValueError:
            return value
    return value


def read_role_entries(path: str) -> list[dict[str, Any]]:
    """Entries of --megatron-config-path: at most one for each role.

    Raises:
        ConfigError: the file is missing or has another form.
    """
    flag = f"--megatron-config-path {path}"
    example = "write `megatron: [{name: critic, role: critic, overrides: {lr: 1e-5}}]`"
    root = read_yaml(_text_of(flag, path), flag)
    entries = root.get("megatron") if isinstance(root, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f"{flag}: has no list `megatron` at the top; {example}")
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("role") not in _ROLES:
            role = entry.get("role") if isinstance(entry, dict) else entry
            raise ConfigError(f"{flag}: {role!r} is not a role; there are actor and critic. So {example}")
        if not isinstance(_overrides_of(entry), dict):
            raise ConfigError(f"{flag}: the overrides of {entry['role']} are no mapping; {example}")
    roles = [entry["role"] for entry in entries]
    if twice := {role for role in roles if roles.count(role) > 1}:
        raise ConfigError(f"{flag}: has {len(roles)} entries, two of them for {', '.join(sorted(twice))}; keep one")
    return entries


def parse_megatron_role_args(base_args: Namespace, path: str | None, role: Literal["actor", "critic"]) -> Namespace:
    """A copy of `base_args` with the overrides of one role.

    Args:
        path: the YAML file; None for no overrides (the critic's own settings still apply).

    Raises:
        ConfigError: the file has another form.
        AssertionError: the role is unknown.
    """
    assert role in _ROLES, f"role is {role!r}; there are {_ROLES}"
    entries = read_role_entries(path) if path else []
    overrides: dict[str, Any] = next((_overrides_of(e) for e in entries if e["role"] == role), {})
    args = copy.deepcopy(base_args)
    changes = {k: v for k, v in overrides.items() if k not in _NOT_OVERRIDDEN}
    if role == "critic":
        changes = _CRITIC | changes
    fields = {flag.dest: flag.fields for flag in table("megatron") if flag.fields}
    for name, value in changes.items():
        if not hasattr(args, name):
            near = did_you_mean(name, set(vars(args)))
            print(f"--megatron-config-path {path}: note: {name} of {role} is not a flag.{near}")
        value = coerced(value, getattr(args, name, None))
        setattr(args, name, value)
        for field in fields.get(name, ()):
            setattr(args, field, value)
            if hasattr(args, "megatron_field_dests"):
                args.megatron_field_dests[field] = name
    return args


def read_engine_groups(path: str) -> Any:
    """What --sglang-config holds; the names in its overrides are checked here, the rest where the plan is made.

    Raises:
        ConfigError: the file is missing or is not YAML, or overrides something that SGLang has not.
    """
    flag = f"--sglang-config {path}"
    root = read_yaml(_text_of(flag, path), flag)
    known = {item.dest.removeprefix("sglang_") for item in table("sglang")} | {"model_path", "enable_memory_saver"}
    for overrides in _all_under("overrides", root):
        for name in overrides if isinstance(overrides, dict) else ():
            if name not in known:
                raise ConfigError(f"{flag}: SGLang's servers have no argument {name}.{did_you_mean(name, known)}")
    return root


def _all_under(key: str, tree: Any) -> Iterator[Any]:
    if isinstance(tree, list):
        for item in tree:
            yield from _all_under(key, item)
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            else:
                yield from _all_under(key, value)


def _overrides_of(entry: Mapping[str, Any]) -> Any:
    """The entry's `overrides` (or, as it is also written, `args`)."""
    return entry.get("overrides", entry.get("args", {})) or {}


def _text_of(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag}: {error.strerror}; give an existing YAML file") from None
