"""The digests of the weights that each sync proved, one small file a version, so that two runs can be compared.

`<run_dir>/digests/version_000003.json` holds {"version": 3, "rollout_id": 2, "tensors": {name: digest}}: the weights
after rollout 2, which generate rollout 3. `rollout_id` -1 stands for the weights that the run began with. Names and
digests are the engines' own: one xxh3-128 a HuggingFace tensor with the embedded engine, one hash a loaded, fused
tensor with SGLang. A tensor takes about 90 bytes, so a model of 300 tensors 27 kB a version.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slime.observability.run_files import DIGESTS_DIR, write_whole


def write_digests(run_dir: Path | str, version: int, digests: Mapping[str, str], rollout_id: int) -> Path:
    """Write the digests of one version; returns the file.

    Args:
        version: which the engines hold since the sync.
        digests: tensor name -> digest.
        rollout_id: the last rollout that the weights were trained on; -1 before the first.
    """
    folder = Path(run_dir) / DIGESTS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"version_{version:06d}.json"
    text = json.dumps({"version": version, "rollout_id": rollout_id, "tensors": dict(digests)}) + "\n"
    write_whole(path, text, survives_power_loss=False)  # `RunLog.put_to_disk` sees to that
    return path


def read_digests(run_dir: Path | str) -> dict[int, dict[str, str]]:
    """Rollout id -> {tensor name: digest}; empty where no sync was recorded.

    Raises:
        ValueError: a file is not what `write_digests` writes.
    """
    found = {}
    for path, rollout_id in digest_files(Path(run_dir) / DIGESTS_DIR):
        found[rollout_id] = _load(path)["tensors"]
    return found


def digest_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """(file, rollout id) of every version in a folder of digests, by version."""
    for path in version_files(folder):
        yield path, rollout_id_of(path)


def rollout_id_of(path: Path) -> int:
    """The last rollout that the weights of a version's file were trained on.

    Raises:
        ValueError: it is not what `write_digests` writes.
    """
    return int(_load(path)["rollout_id"])


def version_files(folder: Path) -> list[Path]:
    """The file of every version in a folder of digests, by version; unread."""
    return sorted(folder.glob("version_*.json"))


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {"rollout_id": int(value["rollout_id"]), "tensors": dict(value["tensors"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no digests of weights ({error!r}); remove it.") from error
