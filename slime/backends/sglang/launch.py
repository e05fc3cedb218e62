"""The command line and environment of one SGLang server; nothing is started here."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from slime.backends.base import EngineSpec
from slime.backends.sglang import server_main
from slime.backends.sglang.pass_through import changed_flags, is_changed
from slime.utils.api_key import ADMIN_VARIABLE, KEY_VARIABLE, admin_key, api_key

PYTHON_VARIABLE = "SLIME_SGLANG_PYTHON"
"""Environment variable: the interpreter that has SGLang, where it is not this one (a CPU test environment, say)."""

# Set by slime itself, from placement; a --sglang- flag cannot change them.
_OURS = ("sglang_host", "sglang_device", "sglang_api_key", "sglang_admin_api_key")

# What stock SGLang needs to run without a GPU: attention and sampling in plain torch, nothing captured or compiled,
# and a cache that leaves the machine's memory to the other processes.
_CPU_DEFAULTS = {
    "sglang_attention_backend": "torch_native",
    "sglang_sampling_backend": "pytorch",
    "sglang_grammar_backend": "none",
    "sglang_cuda_graph_backend_decode": "disabled",
    "sglang_cuda_graph_backend_prefill": "disabled",
    "sglang_mem_fraction_static": "0.2",
    "sglang_max_total_tokens": "20000",
    "sglang_log_level_http": "warning",
}

# What may be given back or is not needed; the user's environment comes first.
_GPU_ENVIRONMENT = {
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "false",  # trainer ranks beside an engine's leave it unequal memory
    "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "false",
}

# Graphs lie in memory that can be released, under the tag cuda_graph. An engine's ranks then copy what they add up once
# more, so engines that keep their memory are not told.
_MEMORY_SAVER_ENVIRONMENT = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true"}

# Of the trainer's process, not for a server: rendezvous, and settings of its allocator. With expandable segments the
# memory saver has nothing to release; it looks for them in one of the two variables only.
_NOT_INHERITED = (
    "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip


def server_command(args: Namespace, spec: EngineSpec) -> tuple[list[str], dict[str, str]]:
    """Command line and whole environment of the SGLang server that `spec` describes.

    Values that slime knows come first (model, address, devices, seed, memory saver), then every `args.sglang_*` that
    differs from SGLang's default. Keys go by the environment (see `server_main`, by which it starts).
    """
    args = Namespace(**(vars(args) | {f"sglang_{name}": value for name, value in spec.overrides.items()}))
    keys = {KEY_VARIABLE: api_key(args), ADMIN_VARIABLE: admin_key(args)}
    argv = [os.environ.get(PYTHON_VARIABLE) or sys.executable, server_main.__file__]
    argv += _from_spec(args, spec)
    argv += changed_flags(args, "sglang", without=_OURS)
    defaults = _CPU_DEFAULTS if spec.device == "cpu" else _gpu_defaults(args)
    if not is_changed(args, "sglang", "sglang_dtype"):
        argv += ["--dtype", spec.dtype]
    for dest, value in defaults.items():
        if not is_changed(args, "sglang", dest):
            argv += ["--" + dest.removeprefix("sglang_").replace("_", "-"), value]
    saves_memory = "--enable-memory-saver" in argv
    return argv, _environment(spec, saves_memory) | {variable: key for variable, key in keys.items() if key}


def limits_of_sampling(args: Namespace) -> dict[str, Any] | None:
    """Sampling parameters like those with which the run limits what may be sampled; None where it never does.

    SGLang loads, and on a new machine compiles, the kernels for limits at the first request that has one: 91 s on an
    H200, in which its scheduler answers nobody.
    """
    used = [(getattr(args, "rollout_top_p", None), getattr(args, "rollout_top_k", None))]
    used += [(dataset.top_p, dataset.top_k) for dataset in getattr(args, "eval_datasets", None) or ()]
    if any((top_p or 1.0) < 1.0 or (top_k or -1) > 1 for top_p, top_k in used):
        return {"top_p": 0.9, "top_k": 2}
    return None


def shared_nccl_settings(args: Namespace) -> dict[str, str]:
    """Environment variables that a server sets for itself, and that whoever shares a process group with it needs too.

    NCCL's ranks on one host hand each other their buffers in one of two forms, and none reads the other's. A server
    turns cuMem, the newer one, off unless the environment sets it or --sglang-enable-symm-mem needs it.
    """
    is_symmetric = bool(getattr(args, "sglang_enable_symm_mem", None))
    return {"NCCL_CUMEM_ENABLE": "1" if is_symmetric else os.environ.get("NCCL_CUMEM_ENABLE", "0")}


def _from_spec(args: Namespace, spec: EngineSpec) -> list[str]:
    pp_size = int(getattr(args, "sglang_pp_size", None) or 1)
    argv = [
        "--model-path", spec.model_path,
        "--host", spec.host,
        "--port", str(spec.port),
        "--device", spec.device,
        "--tp-size", str(spec.num_devices // pp_size),
        "--random-seed", str(spec.seed),
        "--skip-server-warmup",
    ]  # fmt: skip
    if getattr(args, "trust_remote_code", False):
        argv += ["--trust-remote-code"]
    if spec.nccl_port:
        argv += ["--nccl-port", str(spec.nccl_port)]
    if getattr(args, "deterministic_mode", False) and not getattr(args, "sglang_enable_deterministic_inference", False):
        argv += ["--enable-deterministic-inference"]
    if not getattr(args, "sglang_enable_metrics", None):
        argv += ["--enable-metrics"]
    if getattr(args, "use_rollout_routing_replay", False):
        argv += ["--enable-return-routed-experts"]
    argv += _of_its_role(args, spec)
    if spec.device == "cuda" and spec.overrides.get("enable_memory_saver", spec.gives_memory_back):
        argv += ["--enable-memory-saver"]
        if not spec.updates_weights and not is_changed(args, "sglang", "sglang_enable_weights_cpu_backup"):
            argv += ["--enable-weights-cpu-backup"]  # no sync brings them back
        if is_changed(args, "sglang", "sglang_speculative_algorithm"):
            argv += ["--enable-draft-weights-cpu-backup"]
    return argv


def _of_its_role(args: Namespace, spec: EngineSpec) -> list[str]:
    """Of an engine over several nodes, or of one that prefills or decodes only."""
    argv: list[str] = []
    if spec.num_nodes > 1:
        argv += ["--nnodes", str(spec.num_nodes), "--node-rank", str(spec.node_rank)]
        argv += ["--dist-init-addr", spec.dist_address]
    if spec.worker_type != "regular" and not is_changed(args, "sglang", "sglang_disaggregation_mode"):
        argv += ["--disaggregation-mode", spec.worker_type]
    if spec.bootstrap_port and not is_changed(args, "sglang", "sglang_disaggregation_bootstrap_port"):
        argv += ["--disaggregation-bootstrap-port", str(spec.bootstrap_port)]
    return argv


def _gpu_defaults(args: Namespace) -> dict[str, str]:
    defaults = {"sglang_log_level_http": "warning"}
    if (fraction := getattr(args, "engine_memory_fraction", None)) is not None:
        defaults["sglang_mem_fraction_static"] = f"{fraction:g}"
    if getattr(args, "colocate", False):
        # Prefill graphs hold memory that the memory saver cannot release, and a trainer beside it needs.
        defaults["sglang_cuda_graph_backend_prefill"] = "disabled"
    return defaults


def _environment(spec: EngineSpec, saves_memory: bool) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    # A plain /health generates a token, which a paused engine cannot do: it would answer 503 after 20 s.
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "false"
    if Path(spec.model_path).is_dir():
        env.setdefault("HF_HUB_OFFLINE", "1")  # a folder that is missing at an update is an error, not a download
    if spec.device == "cpu":
        if spec.host in ("127.0.0.1", "::1") and sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # by itself gloo listens where the host's name points
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(spec.threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the cores of the processes whose turn it is
            "CUDA_VISIBLE_DEVICES": "",
        }
    else:
        env = _GPU_ENVIRONMENT | (_MEMORY_SAVER_ENVIRONMENT if saves_memory else {}) | env
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.device_ids))
    return env
