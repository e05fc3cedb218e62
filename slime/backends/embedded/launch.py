"""How slime starts an embedded engine: the command line and whole environment of one server process.

Imports neither torch nor transformers, so that a plan can be shown without them.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

import slime
from slime.backends.base import EngineSpec
from slime.rollout.sampling import is_deterministic
from slime.utils.api_key import key_environment

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""Weights in pages of 2 MiB where the kernel gives them: a token reads all of them, and each page must be looked up."""
KV_MEMORY_SHARE_ON_HOST = 0.3
"""Largest part of a host's memory for the key-value caches of all its engines."""
MAX_RUNNING_REQUESTS = 64
PASSED_ON = {
    "sglang_context_length": "--context-length",
    "sglang_max_total_tokens": "--max-total-tokens",
    "sglang_served_model_name": "--served-model-name",
    "sglang_log_level": "--log-level",
}
"""SGLang's flags that mean the same here; others (attention backends, CUDA graphs, ...) have nothing to act on."""


def server_command(args: Namespace, spec: EngineSpec) -> tuple[list[str], dict[str, str]]:
    """(argv, whole environment) of the server process that `spec` describes.

    args: slime's flat arguments; `sglang_*` values that mean something here are passed on, None means the default.
    """
    running = getattr(args, "sglang_max_running_requests", None) or MAX_RUNNING_REQUESTS
    num_engines = max(1, int(getattr(args, "rollout_num_engines", None) or 1))
    argv = [
        sys.executable,
        "-m",
        "slime.backends.embedded.server",
        *("--model-path", str(spec.model_path)),
        *("--host", spec.host),
        *("--port", str(spec.port)),
        *("--dtype", spec.dtype),
        *("--threads", str(spec.threads)),
        *("--weights-dir", str(spec.weights_dir)),
        *("--max-running-requests", str(running)),
        *("--random-seed", str(spec.seed)),
        *("--kv-memory-share", f"{KV_MEMORY_SHARE_ON_HOST / num_engines:.4f}"),
    ]
    if is_deterministic(args):
        argv.append("--enable-deterministic-inference")
    for name, flag in PASSED_ON.items():
        value = getattr(args, name, None)
        if value is not None:
            argv += [flag, str(value)]
    return argv, _environment(spec.threads) | key_environment(args)


def _environment(num_threads: int) -> dict[str, str]:
    threads = str(num_threads)
    sources = str(Path(slime.__file__).resolve().parents[1])  # so that it starts where slime is not installed, too
    paths = [sources, *filter(None, [os.environ.get("PYTHONPATH")])]
    # Waiting threads must sleep: spinning ones take the core from the process whose turn it is.
    return (
        {"GLIBC_TUNABLES": HUGE_PAGES}
        | dict(os.environ)
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            "KMP_BLOCKTIME": "0",
            "GOMP_SPINCOUNT": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )
