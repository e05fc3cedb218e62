"""Starts sglang-router with policies that its own command line refuses although the router has them.

    python -m slime.backends.sglang.router_main --policy consistent_hashing [sglang-router's other flags]

Version 0.3.2 knows `consistent_hashing` and `prefix_hash` in `RouterArgs` but not in its parser's choices. The key that
clients must show (SLIME_API_KEY) comes by the environment: command lines can be read by every user of a machine.
"""

import argparse
import dataclasses
import os
import sys

from slime.utils.api_key import KEY_VARIABLE

_POLICY_FLAGS = ("policy", "prefill_policy", "decode_policy")


def main(argv: list[str]) -> None:
    """Run the router until it is ended."""
    from sglang_router.launch_router import launch_router, parse_router_args

    policies = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in _POLICY_FLAGS:
        policies.add_argument("--" + flag.replace("_", "-"))
    chosen, rest = policies.parse_known_args(argv)
    router_args = parse_router_args(rest)
    given = {flag: value for flag, value in vars(chosen).items() if value is not None}
    if key := os.environ.pop(KEY_VARIABLE, None):
        given["api_key"] = key
    launch_router(dataclasses.replace(router_args, **given))


if __name__ == "__main__":
    main(sys.argv[1:])
