"""Environment of the processes that Ray starts."""

from typing import Any

NOSET_VISIBLE_DEVICES_ENV_VARS_LIST = [
    f"RAY_EXPERIMENTAL_NOSET_{name}_VISIBLE_DEVICES" for name in ("CUDA", "ROCR", "ASCEND_RT", "HABANA_VISIBLE_MODULES")
]
"""Set to 1, they keep Ray from hiding devices: placement decides which device a process sees."""


def add_default_ray_env_vars(env: dict[str, str] | None = None) -> dict[str, str]:
    """`env` with slime's defaults for Ray workers underneath."""
    defaults = dict.fromkeys(NOSET_VISIBLE_DEVICES_ENV_VARS_LIST, "1") | {"RAY_USE_UVLOOP": "0"}
    return defaults | (env or {})


def thread_env(threads: int) -> dict[str, str]:
    """CPU threads of one process, with waiting threads asleep.

    OpenMP's default barrier spins; where processes take turns on few cores, that starves whoever has work.
    """
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Lock:
    """A lock that several actors share; make it a remote actor (`ray.remote(Lock).remote()`) and poll `acquire`."""

    def __init__(self) -> None:
        self._held = False

    def acquire(self) -> bool:
        """True if the caller has the lock now."""
        if self._held:
            return False
        self._held = True
        return True

    def release(self) -> None:
        if not self._held:
            raise RuntimeError("Lock.release() without a matching acquire().")
        self._held = False

    def state(self) -> dict[str, Any]:
        return {"held": self._held}
