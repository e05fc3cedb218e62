"""Routes that change the engine: pause and continue, abort, flush, memory, and weights with their proof."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from slime.backends.embedded.engine import PAUSE_MODES, give_back_memory
from slime.backends.embedded.frontend import Frontend
from slime.backends.embedded.protocol import RequestError
from slime.backends.embedded.web import bad_body, json_reply, read_json, read_object, required
from slime.backends.embedded.weights import TensorInfo, WeightError, load_folder
from slime.weight_sync.digest import tensor_digest

logger = logging.getLogger(__name__)

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


class Control:
    """The control routes of one engine. weights_dir: the only folder that shared weights are read from, or None."""

    def __init__(self, frontend: Frontend, weights_dir: Path | None) -> None:
        self.frontend, self.engine = frontend, frontend.engine
        self.weights_dir = weights_dir
        self.model_path = self.engine.model.path
        self._snapshot: dict[str, str] | None = None

    # Generation

    async def pause(self, http: HttpRequest) -> Response:
        body = await read_object(http)
        mode = body.get("mode", "abort")
        if mode not in PAUSE_MODES:
            raise bad_body(f"/pause_generation: mode must be one of {', '.join(PAUSE_MODES)}, got {mode!r}.")
        await self.frontend.pause(mode)
        return json_reply({"message": "Generation paused successfully.", "status": "ok"})

    async def resume(self, http: HttpRequest) -> Response:
        await read_object(http)
        await self.frontend.resume()
        return json_reply({"message": "Generation continued successfully.", "status": "ok"})

    async def abort(self, http: HttpRequest) -> Response:
        body = await read_object(http, rid=str, abort_all=bool)
        await self.frontend.abort(body.get("rid"), everything=bool(body.get("abort_all")))
        return Response(status_code=200)

    async def flush_cache(self, http: HttpRequest) -> Response:
        deadline = time.monotonic() + float(http.query_params.get("timeout", 0.0))
        while not (is_flushed := await self.frontend.run(self.engine.flush_cache)) and time.monotonic() < deadline:
            await _nap()
        if is_flushed:
            return Response(FLUSHED)
        return Response("Flush cache failed: requests are running or waiting.\n", status_code=400)

    # Memory

    async def release_memory(self, http: HttpRequest) -> Response:
        tags = await _tags(http)
        await self.frontend.run(lambda: self.engine.release_memory(tags))
        return json_reply(None)

    async def resume_memory(self, http: HttpRequest) -> Response:
        tags = await _tags(http)
        await self.frontend.run(lambda: self.engine.resume_memory(tags))
        return json_reply(None)

    # Weights

    async def update_from_disk(self, http: HttpRequest) -> Response:
        body = await read_object(
            http, model_path=str, weight_version=str, abort_all_requests=bool, flush_cache=bool, load_format=str
        )
        path = required(body, "model_path", http.url.path)
        version = body.get("weight_version")
        if body.get("abort_all_requests"):
            await self.frontend.abort(None, everything=True)

        def load() -> int:
            self._refuse_while_released()
            count = load_folder(self.engine.weights, path, is_tied=self.engine.model.is_tied)
            self._after_load(version, flush=body.get("flush_cache", True))
            return count

        try:
            count = await self.frontend.when_idle(load)
        except (WeightError, OSError, ValueError, KeyError) as error:
            if isinstance(error, RequestError):
                raise
            content = {"success": False, "message": f"Failed to load weights: {error}", "num_paused_requests": 0}
            return json_reply(content, 400)
        self.model_path = path
        logger.info("loaded %d tensors from %s, weight version %s", count, path, self.engine.weight_version)
        message = "Succeeded to update model weights."
        if version is not None:
            message += f" Weight version updated to {version}."
        return json_reply({"success": True, "message": message, "num_paused_requests": len(self.engine.scheduler)})

    async def update_from_shared_memory(self, http: HttpRequest) -> Response:
        body = await read_object(http, file=str, tensors=list, weight_version=str, last=bool, digests=dict)
        path = http.url.path
        file = self._shared_file(required(body, "file", path))
        manifest = [_entry(entry) for entry in required(body, "tensors", path)]
        version, is_last, digests = body.get("weight_version"), bool(body.get("last")), body.get("digests") or {}

        def load() -> int:
            if not self.engine.is_paused:
                raise RequestError(
                    "Weights can be taken over only while generation is paused, but it runs. "
                    "Call /pause_generation first.",
                    status=409,
                )
            self._refuse_while_released()
            self.engine.weights.check_infos((info for info, _ in manifest), same_dtype=True)
            tensors = _shared_tensors(file, manifest)
            for name, tensor in tensors:
                if name in digests and (seen := tensor_digest(tensor)) != digests[name]:
                    raise WeightError(
                        f"{name} in {file.name} has digest {seen}, but the sender announced {digests[name]}: "
                        "it was changed on the way. Nothing was loaded from this file; send it again."
                    )
            count = self.engine.weights.write(tensors)
            missing = self.engine.weights.missing() if is_last else []
            if missing:
                raise WeightError(
                    f"This was said to be the last bucket, but {len(missing)} tensors never came, such as {missing[0]}."
                )
            self._after_load(version if is_last else None, flush=True, is_last=is_last)
            return count

        count = await self.frontend.run(load)
        return json_reply({"success": True, "message": f"Loaded {count} tensors.", "num_tensors": count})

    def _shared_file(self, name: str) -> Path:
        if self.weights_dir is None:
            raise RequestError("This engine was started without --weights-dir, so it reads no shared weights.")
        file = self.weights_dir / name
        if Path(name).name != name or name in (".", "..") or file.is_symlink():
            raise RequestError(f"`file` must be the bare name of a file inside {self.weights_dir}, got {name!r}.")
        if not file.is_file():
            raise WeightError(f"{file} does not exist.")
        return file

    def _refuse_while_released(self) -> None:
        if "weights" in self.engine.released:
            raise RequestError(
                'The memory of weights is released. Call /resume_memory_occupation {"tags": ["weights"]} first.'
            )

    def _after_load(self, version: str | None, *, flush: bool, is_last: bool = True) -> None:
        self.engine.weights_changed(version)
        if flush:
            self.engine.flush_cache()
        if is_last:
            give_back_memory()

    async def update_version(self, http: HttpRequest) -> Response:
        body = await read_object(http, new_version=str, abort_all_requests=bool)
        version = required(body, "new_version", http.url.path)
        if body.get("abort_all_requests", True):
            await self.frontend.abort(None, everything=True)

        def change() -> None:
            self.engine.weight_version = version

        await self.frontend.run(change)
        return json_reply({"success": True, "message": f"Weight version updated to {version}", "new_version": version})

    async def get_version(self, http: HttpRequest) -> Response:
        return json_reply({"weight_version": self.engine.weight_version})

    async def get_weights_by_name(self, http: HttpRequest) -> Response:
        body = await read_json(http)
        if not isinstance(body, dict) or not isinstance(body.get("name"), str):
            raise bad_body(f"{http.url.path} needs {{'name': str, 'truncate_size': int}}, got {body!r}.")
        size = int(body.get("truncate_size", 100))

        def read() -> Any:
            try:
                return self.engine.weights.read(body["name"])[:size].float().tolist()
            except WeightError as error:
                raise RequestError(f"Get parameter by name failed: {error}") from error

        return json_reply(await self.frontend.run(read))

    async def check_weights(self, http: HttpRequest) -> Response:
        body = await read_object(http, action=str, skip_tensor_list=list)
        action, skipped = body.get("action", "checksum"), body.get("skip_tensor_list") or []
        actions = {
            "checksum": self._checksum,
            "snapshot": self._take_snapshot,
            "reset_tensors": self._reset_tensors,
            "compare": self._compare,
        }
        if action not in actions:
            raise WeightError(f"Unsupported action={action!r}; known are {', '.join(actions)}.")

        def is_checked(name: str) -> bool:
            return not any(part in name for part in skipped)

        return json_reply(await self.frontend.run(lambda: actions[action](is_checked)))

    def _checksum(self, is_checked: Any) -> dict[str, Any]:
        checksums = {name: value for name, value in self.engine.weights.digests().items() if is_checked(name)}
        overall = hashlib.sha256()
        for name in sorted(checksums):
            overall.update(name.encode() + checksums[name].encode())
        rank = {
            "checksums": checksums,
            "per_gpu_checksum": overall.hexdigest(),
            "parallelism_info": [{"role": "target", "tp_rank": 0, "tp_size": 1, "dp_rank": 0, "dp_size": 1}],
        }
        whole = hashlib.sha256(overall.hexdigest().encode()).hexdigest()
        return {"success": True, "message": "Success.", "ranks": [rank], "per_engine_checksum": whole}

    def _take_snapshot(self, is_checked: Any) -> dict[str, Any]:
        self._snapshot = self.engine.weights.digests()
        return {"success": True, "message": "Success."}

    def _reset_tensors(self, is_checked: Any) -> dict[str, Any]:
        weights = self.engine.weights
        generator = torch.Generator().manual_seed(0)
        named = (
            (name, torch.randn(weights.shape(name), generator=generator))
            for name in weights.names()
            if is_checked(name)
        )
        weights.write(named)
        self.engine.weights_changed(None)
        return {"success": True, "message": "Success."}

    def _compare(self, is_checked: Any) -> dict[str, Any]:
        if self._snapshot is None:
            raise WeightError("There is no snapshot to compare with; call with action snapshot first.")
        now = self.engine.weights.digests()
        changed = [name for name in now if is_checked(name) and now[name] != self._snapshot[name]]
        if changed:
            raise WeightError(f"{len(changed)} tensors differ from the snapshot, such as {changed[0]}.")
        self._snapshot = None
        return {"success": True, "message": "Success."}


async def _nap() -> None:
    import asyncio

    await asyncio.sleep(0.05)


async def _tags(http: HttpRequest) -> list[str]:
    body = await read_object(http, tags=list)
    return body.get("tags") or ["weights", "kv_cache"]


def _entry(entry: Any) -> tuple[TensorInfo, int]:
    """One line of a manifest: {"name", "dtype", "shape", "offset"} -> (info, offset in bytes)."""
    try:
        dtype = getattr(torch, str(entry["dtype"]).removeprefix("torch."))
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{entry['dtype']!r} is not a dtype")
        info = TensorInfo(str(entry["name"]), dtype, tuple(int(size) for size in entry["shape"]))
        return info, int(entry["offset"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad_body(
            f"A tensor of the manifest must be {{'name', 'dtype', 'shape', 'offset'}}, got {entry!r}: {error!r}."
        ) from error


def _shared_tensors(file: Path, manifest: list[tuple[TensorInfo, int]]) -> list[tuple[str, Tensor]]:
    """Views of the tensors in a mapped file; raises `WeightError` when one does not lie inside it."""
    size = file.stat().st_size
    ends = [offset + info.dtype.itemsize * _count(info) for info, offset in manifest]
    for (info, offset), end in zip(manifest, ends, strict=True):
        if offset < 0 or end > size or offset % info.dtype.itemsize:
            raise WeightError(
                f"{info.name} is said to lie at bytes {offset} to {end} of {file.name}, which has {size} bytes."
            )
    if not manifest or not size:
        return []
    memory = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    return [
        (info.name, memory[offset:end].view(info.dtype).view(info.shape))
        for (info, offset), end in zip(manifest, ends, strict=True)
    ]


def _count(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count
