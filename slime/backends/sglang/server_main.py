"""Starts a stock SGLang server with the keys of its environment: its command line is read by all users of the machine.

    python server_main.py --model-path ... [SGLang's other flags]

The server gets SLIME_API_KEY as --api-key and SLIME_ADMIN_API_KEY as --admin-api-key, in the arguments that Python sees
and the system does not show. Runs as a script, by its path, with the standard library only: the interpreter that has
SGLang may not have slime.
"""

import os
import runpy
import sys

_KEYS = {"--api-key": "SLIME_API_KEY", "--admin-api-key": "SLIME_ADMIN_API_KEY"}


def main() -> None:
    """Run the server, as `python -m sglang.launch_server` does, until it is ended."""
    sys.path[0] = os.getcwd()  # as with -m; the folder of this script has modules that must not hide others
    for flag, variable in _KEYS.items():
        if key := os.environ.pop(variable, None):
            sys.argv += [f"{flag}={key}"]  # one word: a key may begin with a dash
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
