"""YAML files that change `args`: --custom-config-path for the whole run, --megatron-config-path for one role."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from slime.arguments.flag_tables import table
from slime.config.errors import ConfigError, did_you_mean
from slime.config.eval_datasets import read_yaml

_ROLES = ("actor", "critic")
_NOT_OVERRIDDEN = ("num_nodes", "num_gpus_per_node")
_CRITIC = {
    "kl_coef": 0.0,
    "use_opd": False,
    "custom_advantage_function_path": None,
    "untie_embeddings_and_output_weights": True,
    "disable_param_buffers_cpu_backup": False,
}


def read_custom_config(path: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of --custom-config-path, text that stands for a number turned into one.

    Raises:
        ConfigError: the file is missing or is not a mapping of names.
    """
    flag = f"--custom-config-path {path}"
    entries = read_yaml(_text_of(flag, path), flag)
    if entries is None:
        return {}
    if not isinstance(entries, dict) or not all(isinstance(k, str) and k.isidentifier() for k in entries):
        raise ConfigError(f"{flag}: is not a mapping of names; write lines like `max_turns: 5`")
    return {name: coerced(value, values.get(name)) for name, value in entries.items()}


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


def _overrides_of(entry: Mapping[str, Any]) -> Any:
    """The entry's `overrides` (or, as it is also written, `args`)."""
    return entry.get("overrides", entry.get("args", {})) or {}


def _text_of(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag}: {error.strerror}; give an existing YAML file") from None
