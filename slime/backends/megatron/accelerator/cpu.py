"""Lets Megatron-core train on a CPU: the names of `torch.cuda` that it uses get their CPU meaning.

Megatron-core writes `device=torch.cuda.current_device()` and `device="cuda"` all through its training path. Here the
current device is `cpu`, streams and events do nothing (what is issued on a CPU is done), and the "CUDA" random state is
the CPU generator. Checked with megatron-core 0.16; tests/distributed trains through every override.
"""

import contextlib
import ctypes
import functools
import logging
import resource
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.utils._device

from slime.backends.megatron.accelerator.base import MemoryFacts

_FACTORIES = (
    "tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip


class CpuAccelerator:
    """The CPU, with gloo between processes."""

    backend = "gloo"
    device = torch.device("cpu")
    _installed = False

    def install(self) -> None:
        if CpuAccelerator._installed:
            return
        CpuAccelerator._installed = True
        _override_devices()
        _override_random_state()
        _override_factories()
        _override_tensor_type()
        _import_megatron_uncompiled()
        _override_dispatcher_splits()
        _override_collectives_of_one()

    def make_deterministic(self) -> None:
        """Sums over indices in one order. (Products and gloo's reductions have one already, for the same number of
        threads, which the plan shares out, and of ranks.)"""
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # nothing reads it; filling costs passes over memory
        )

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        """glibc keeps freed memory in its arenas; malloc_trim gives whole pages back to the machine."""
        libc = _libc()
        if libc is not None:
            libc.malloc_trim(0)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def memory(self) -> MemoryFacts:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return MemoryFacts(psutil.Process().memory_info().rss, peak_kib * 1024, psutil.virtual_memory().total)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """glibc, or None where the C library has no malloc_trim (musl, macOS)."""
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


class _Immediate:
    """A stream or an event of a device whose work is done as soon as it is issued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Immediate)

    def __hash__(self) -> int:
        return 0

    def record_event(self, *args: Any) -> "_Immediate":
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "_Immediate") -> float:
        return 0.0

    def _nothing(self, *args: Any) -> None:
        pass

    record = wait = synchronize = wait_stream = wait_event = record_stream = _nothing


class _Generators:
    """`torch.cuda.default_generators`: whichever device is asked for, the CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _returning(value: Any) -> Callable[..., Any]:
    """A new function each time: torch._dynamo tells the names of torch.cuda apart by their functions' identity."""
    return lambda *args, **kwargs: value


def _override_devices() -> None:
    cuda = torch.cuda
    cuda.is_available = _returning(False)  # a CUDA build with a GPU behaves as a CPU build does
    cuda.current_device = _returning(torch.device("cpu"))
    cuda.device_count = _returning(1)
    cuda.Stream = cuda.Event = cuda.ExternalStream = _Immediate
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _returning(_Immediate()))
    for name in ("stream", "device"):
        setattr(cuda, name, _returning(contextlib.nullcontext()))
    for name in ("synchronize", "empty_cache", "set_device", "_lazy_init", "ipc_collect"):
        setattr(cuda, name, _returning(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _returning(0))
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _returning(None))


def _override_random_state() -> None:
    """The random states of the tensor- and expert-parallel regions become forks of the CPU generator.

    `_lazy_call` has to run its callback: without CUDA it would queue it for ever, and no fork would happen. Megatron
    copies that name when it is imported, which is why this module must be installed before.
    """
    cuda = torch.cuda
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = _Generators()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()  # it is meant to: the fork is the CPU's
    )


def _override_factories() -> None:
    # `with torch.device("meta")` finds the factories by identity in a list that torch builds once. Have it built from
    # the plain ones, or transformers' from_pretrained fills its buffers with garbage.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = _returning(None)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device") or "").startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _override_tensor_type() -> None:
    """Megatron's optimizers sort parameters by the name of their type and know only "torch.cuda.FloatTensor"."""
    tensor_type = torch.Tensor.type

    def type_named_as_on_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        return tensor_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_named_as_on_cuda


def _import_megatron_uncompiled() -> None:
    """Compiling Megatron's small pointwise functions needs a C++ compiler and a start that a CPU run does not get back.

    It decorates them with torch.compile while it is imported; afterwards `disable_jit_fuser` keeps it off.
    """
    compile_with_dynamo, torch.compile = torch.compile, lambda function=None, **kwargs: function
    try:
        import megatron.core.jit
    finally:
        torch.compile = compile_with_dynamo
    megatron.core.jit.disable_jit_fuser()


def _override_dispatcher_splits() -> None:
    """The expert-parallel dispatcher wants its split sizes as numpy arrays, but converts only what leaves a GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = moved


def _override_collectives_of_one() -> None:
    """gloo copies whole buffers to reduce or gather them, even for a group of one rank, whose result is in its place
    already: a fifth of a short training step."""
    from megatron.core.distributed import param_and_grad_buffer

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if kwargs["group"].size() == 1 and output.data_ptr() == source.data_ptr():
                return None
            return collective(output, source, *args, **kwargs)

        return wrapped

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))
