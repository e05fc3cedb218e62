"""Small things many rooms need: loading a user's function, singletons, boxes, ports, periods and groups."""

import base64
import functools
import hashlib
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@functools.cache
def load_function(path: str, default_name: str | tuple[str, ...] | None = None) -> Any:
    """The function or class that a `--...-path` flag names.

    Args:
        path: `package.module.name`, `file.py:name`, or `file.py` alone.
        default_name: names to look for in a bare `file.py`, the first that it defines wins; after them the file's own
            stem, then the only public function or class in it.

    Raises:
        ValueError: the path has none of these forms, or a bare file leaves the choice open.
        ImportError: the module, the file or the name is not there.
    """
    file, separator, name = path.rpartition(":")
    if separator and file.endswith(".py"):
        return _attribute(_module_of_file(file), name, path)
    if path.endswith(".py"):
        return _default_of_file(path, default_name)
    module_name, separator, name = path.rpartition(".")
    if not separator or not module_name or not name:
        raise ValueError(
            f"{path!r} names no function. Write package.module.name, file.py:name, or file.py with one function in it."
        )
    return _attribute(importlib.import_module(module_name), name, path)


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        where = getattr(module, "__file__", None) or module.__name__
        known = ", ".join(_own_names(module)) or "nothing public"
        raise ImportError(f"{path!r}: {where} has no {name!r}. It defines {known}.") from None


def _default_of_file(path: str, default_name: str | tuple[str, ...] | None) -> Any:
    module = _module_of_file(path)
    wanted = (default_name,) if isinstance(default_name, str) else tuple(default_name or ())
    named = [name for name in (*wanted, Path(path).stem) if hasattr(module, name)]
    own = _own_names(module)
    # What a file imports (a base class, slime's own `generate`) is meant only if it defines nothing itself.
    candidates = [name for name in named if not _is_imported(module, name)]
    candidates += own if len(own) == 1 else []
    candidates += named if not own else []
    if candidates:
        return getattr(module, candidates[0])
    raise ValueError(
        f"{path!r} does not say which function is meant: it defines {', '.join(own) or 'none'}. "
        f"Write {path}:name, or call the function {wanted[0] if wanted else Path(path).stem!r}."
    )


def _is_imported(module: ModuleType, name: str) -> bool:
    value = getattr(module, name)
    is_definition = inspect.isroutine(value) or inspect.isclass(value)
    return is_definition and getattr(value, "__module__", None) != module.__name__


def _own_names(module: ModuleType) -> list[str]:
    """Public functions and classes that the module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and not _is_imported(module, name)
    ]


def _module_of_file(path: str) -> ModuleType:
    """Import a file once. Its folder joins `sys.path`, so that it finds its neighbours."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ImportError(
            f"There is no file {path!r} (looked for {file}). Give its path from here, or an absolute one."
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    if _is_importable_as(file.stem, file):
        return importlib.import_module(file.stem)
    name = f"slime_plugin_{file.stem}_{hashlib.sha1(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python cannot import {file}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_importable_as(name: str, file: Path) -> bool:
    """Whether `import name` gives this file: then it is one module however a plug-in is named."""
    try:
        spec = importlib.util.find_spec(name)
    except (ValueError, ImportError):
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


class SingletonMeta(type):
    """Gives each class one instance, made by the first call; later calls ignore their arguments."""

    _instances: ClassVar[dict[type, Any]] = {}

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in SingletonMeta._instances:
            SingletonMeta._instances[cls] = super().__call__(*args, **kwargs)
        return SingletonMeta._instances[cls]

    @classmethod
    def clear_instances(mcs) -> None:
        """Forget every instance of every class (for tests)."""
        mcs._instances.clear()


class Box(Generic[T]):
    """Holds a value that the transport must not look into, such as a reference to an object store."""

    def __init__(self, inner: T) -> None:
        self._inner = inner

    @property
    def inner(self) -> T:
        return self._inner


def exec_command(cmd: str, capture_output: bool = False) -> str | None:
    """Run `cmd` in bash and wait; its standard output when captured.

    Raises:
        subprocess.CalledProcessError: it did not end with 0.
    """
    result = subprocess.run(
        ["bash", "-c", cmd], check=True, text=True, stdout=subprocess.PIPE if capture_output else None
    )
    return result.stdout if capture_output else None


def get_current_node_ip() -> str:
    """The address under which other nodes reach this one."""
    from slime.utils.http_utils import get_host_info

    return get_host_info()[1]


def get_free_port(start_port: int = 10000, consecutive: int = 1) -> int:
    """The first of `consecutive` ports in a row, from `start_port` on, that nothing listens on."""
    from slime.utils.http_utils import is_port_available

    port = start_port
    while port + consecutive <= 65536:
        taken = [p for p in range(port, port + consecutive) if not is_port_available(p)]
        if not taken:
            return port
        port = taken[-1] + 1
    raise RuntimeError(f"No {consecutive} free ports in a row from {start_port} to 65535 on this machine.")


def should_run_periodic_action(
    rollout_id: int,
    interval: int | None,
    num_rollout_per_epoch: int | None = None,
    num_rollout: int | None = None,
) -> bool:
    """Whether something done every `interval` rollouts, at epoch ends and after the last rollout is due now."""
    if interval is None:
        return False
    if num_rollout is not None and rollout_id == num_rollout - 1:
        return True
    step = rollout_id + 1
    return step % interval == 0 or (num_rollout_per_epoch is not None and step % num_rollout_per_epoch == 0)


def group_by(iterable: Iterable[T], key: Callable[[T], K] | None = None) -> dict[K, list[T]]:
    """Lists of the items with the same key, in order of first appearance; without `key` the item is its key."""
    groups: dict[Any, list[T]] = {}
    for item in iterable:
        groups.setdefault(item if key is None else key(item), []).append(item)
    return groups


def chunk_named_params_by_size(
    named_params: Iterable[tuple[str, "Tensor"]], chunk_size: int
) -> Iterator[list[tuple[str, "Tensor"]]]:
    """Split into lists of at most `chunk_size` bytes; a larger tensor is alone."""
    chunk: list[tuple[str, Tensor]] = []
    held = 0
    for name, param in named_params:
        size = param.numel() * param.element_size()
        if chunk and held + size > chunk_size:
            yield chunk
            chunk, held = [], 0
        chunk.append((name, param))
        held += size
    if chunk:
        yield chunk


def decode_int32_meta_array(meta: Mapping[str, Any], keys: str | Sequence[str]) -> "Tensor | None":
    """The int32 array under the first of `keys` that an engine's reply has: [n] tensor, None when it has none.

    Engines send it as base64 text, bytes, tensor, array or list.
    """
    names = (keys,) if isinstance(keys, str) else keys
    value = next((meta[name] for name in names if meta.get(name) is not None), None)
    if value is None:
        return None
    import torch

    if isinstance(value, str):
        value = base64.b64decode(value, validate=True)
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytearray(value)
        if len(raw) % 4:
            raise ValueError(f"{names[0]} has {len(raw)} bytes, which is not a whole number of int32.")
        return torch.frombuffer(raw, dtype=torch.int32) if raw else torch.empty(0, dtype=torch.int32)
    return torch.as_tensor(value).to(device="cpu", dtype=torch.int32).flatten()


def sampling_seed(*parts: object) -> int:
    """A seed of 31 bits that depends on all `parts` and on nothing else, the same on every machine."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
