"""Starts a stock SGLang server in the process that runs this file, as `python -m sglang.launch_server` would, but:

    python server_main.py --model-path ... [SGLang's other flags]

- with the keys of its environment, SLIME_API_KEY as --api-key and SLIME_ADMIN_API_KEY as --admin-api-key: they are in
  the arguments that Python sees, not on the command line, which all users of the machine can read;
- without Megatron, in the server's own processes too. SGLang's debug module imports megatron-core wherever it is
  installed, and megatron-core's inference contexts then set `torch_memory_saver.hook_mode = "torch"`, with which no
  CUDA graph can give its memory back: a server with --enable-memory-saver ends while it captures its first graph.

Runs as a script, by its path, with the standard library only: the interpreter that has SGLang may not have slime.
"""

import os
import runpy
import sys

_KEYS = {"--api-key": "SLIME_API_KEY", "--admin-api-key": "SLIME_ADMIN_API_KEY"}


def main() -> None:
    """Run the server until it is ended."""
    sys.path[0] = os.getcwd()  # as with -m; the folder of this script has modules that must not hide others
    for flag, variable in _KEYS.items():
        if key := os.environ.pop(variable, None):
            sys.argv += [f"{flag}={key}"]  # one word: a key may begin with a dash
    # __main__ stays this file (no alter_sys): multiprocessing runs it in each process that the server starts.
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ in ("__main__", "__mp_main__"):  # the server, or a process that it started
    sys.modules["megatron"] = None  # type: ignore[assignment]  # "import megatron" raises ModuleNotFoundError

if __name__ == "__main__":
    main()
