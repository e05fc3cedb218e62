"""Dumps for debugging: a rollout to replay without engines, and what the trainer made of it.

Files hold plain containers, numbers, texts and tensors only, and are loaded with `weights_only=True`: a dump from
someone else cannot run code.
"""

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slime.observability.rollout_metrics import flatten_samples
from slime.utils.types import Sample

TRAIN_DUMP_VERSION = 2
PNG_KEY = "__png__"

WHOLE_KEYS = frozenset({"raw_reward", "total_lengths"})
SCHEDULE_KEYS = ("partition", "micro_batch_indices", "num_microbatches", "global_batch_sizes")


def save_debug_rollout_data(
    template: str, rollout_id: int, samples: Iterable[Any], *, evaluation: bool = False
) -> Path:
    """Writes {"rollout_id", "samples": [Sample.to_dict(), ...]} and returns the path.

    Args:
        template: a path with `{rollout_id}`, which becomes the number, or `eval_<number>` for an evaluation.
        samples: nested or flat.

    Raises:
        TypeError: a sample holds something that a dump cannot, with its name.
    """
    import torch

    path = _path(template, rollout_id, evaluation)
    rows = [_plain(sample.to_dict(), f"sample {i}") for i, sample in enumerate(flatten_samples(samples))]
    _save(torch, {"rollout_id": rollout_id, "samples": rows}, path)
    return path


def load_debug_rollout_data(
    template: str, rollout_id: int, *, evaluation: bool = False, subsample: float | None = None
) -> list[Sample]:
    """The samples of a dump.

    Args:
        subsample: keep this share of them, half from the front and half from the back
            (--load-debug-rollout-data-subsample).
    """
    import torch

    path = _path(template, rollout_id, evaluation)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no dump of rollout {rollout_id} at {path}. --load-debug-rollout-data takes the template that "
            "--save-debug-rollout-data was given, with {rollout_id} in it."
        )
    data = torch.load(path, weights_only=True)
    samples = [Sample.from_dict(_restored(row)) for row in data["samples"]]
    if subsample is None:
        return samples
    if not 0 < subsample <= 1:
        raise ValueError(f"--load-debug-rollout-data-subsample is a share above 0 and at most 1, not {subsample}.")
    count = int(len(samples) * subsample)
    front = count // 2
    return samples[:front] + samples[len(samples) - (count - front) :]


def build_train_dump(rollout_id: int, rank: int, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the trainer made of a rollout, sample by sample in rollout order (format version 2).

    Args:
        rank: of the process that writes.
        shards: one a data-parallel rank: {"rank", "data_parallel_rank", "rollout_data"}, where rollout_data holds
            lists with one entry per local sample, `partition` (their positions in the rollout) and the schedule;
            fields that context parallelism divides must be whole again.
    """
    rows, schedules, raw_reward = [], [], None
    for shard in shards:
        data = shard["rollout_data"]
        partition = [int(position) for position in data["partition"]]
        per_sample = {
            key: values
            for key, values in data.items()
            if isinstance(values, list | tuple) and len(values) == len(partition)
            if key not in WHOLE_KEYS and key not in SCHEDULE_KEYS
        }
        for local, position in enumerate(partition):
            row = {key: values[local] for key, values in per_sample.items()}
            row["sample_index"] = row.get("sample_indices", position)
            rows.append(row | {"data_parallel_rank": shard["data_parallel_rank"], "rollout_position": position})
        raw_reward = data.get("raw_reward", raw_reward)
        schedule = {key: data[key] for key in (*SCHEDULE_KEYS, "sample_indices") if key in data}
        schedules.append({"rank": shard["rank"], "data_parallel_rank": shard["data_parallel_rank"], **schedule})
    return {
        "format_version": TRAIN_DUMP_VERSION,
        "rollout_id": rollout_id,
        "rank": rank,
        "samples": sorted(rows, key=lambda row: row["rollout_position"]),
        "dp_shards": schedules,
        "raw_reward": raw_reward,
    }


def save_debug_train_data(template: str, dump: Mapping[str, Any]) -> Path:
    """Writes a train dump to the template's path (`{rollout_id}` and `{rank}`), and returns it."""
    import torch

    path = Path(template.format(rollout_id=dump["rollout_id"], rank=dump["rank"]))
    _save(torch, _plain(dict(dump), "train dump"), path)
    return path


def _path(template: str, rollout_id: int, evaluation: bool) -> Path:
    return Path(template.format(rollout_id=f"eval_{rollout_id}" if evaluation else rollout_id))


def _save(torch: Any, data: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    torch.save(data, partial)
    partial.replace(path)


def _plain(value: Any, where: str) -> Any:
    """The value in terms that `weights_only` loads: arrays become tensors, images PNG bytes."""
    import numpy as np
    import torch

    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            return torch.from_numpy(np.ascontiguousarray(value))
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value.tolist())]
    if isinstance(value, Mapping):
        return {_plain(key, f"{where} key"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "save") and hasattr(value, "getbands"):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return {PNG_KEY: buffer.getvalue()}
    raise TypeError(
        f"A dump holds numbers, texts, lists, dicts, tensors and images, but {where} is a {type(value).__name__}. "
        "Keep it out of the sample, or store it as one of these."
    )


def _restored(value: Any) -> Any:
    """The inverse of `_plain` for images."""
    if isinstance(value, dict):
        if value.keys() == {PNG_KEY}:
            from PIL import Image

            return Image.open(io.BytesIO(value[PNG_KEY]))
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value
