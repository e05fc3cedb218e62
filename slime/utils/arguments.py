"""Alias of `slime.arguments` under the path that users' launch scripts and plug-ins import."""

from slime.arguments import (
    get_slime_extra_args_provider,
    parse_args,
    parse_megatron_role_args,
    reset_arg,
    slime_validate_args,
)

__all__ = [
    "get_slime_extra_args_provider",
    "parse_args",
    "parse_megatron_role_args",
    "reset_arg",
    "slime_validate_args",
]
