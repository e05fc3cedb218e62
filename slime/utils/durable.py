"""Files that are there whole or not at all, whenever the process or the machine stops.

A rename on one file system is atomic, but only what was flushed to the disk before it survives a power cut; so every
function here flushes content first, renames, and flushes the folder that holds the name.
"""

import os
import shutil
from pathlib import Path

PARTIAL_SUFFIX = ".partial"
DELETING_PREFIX = ".deleting_"


def sync_file(path: str | Path) -> None:
    """Flush a file's content to the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: str | Path) -> None:
    """Flush the names in a folder to the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: str | Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name; leftovers of a killed process are known by the suffix."""
    return path.with_name(f"{path.name}{PARTIAL_SUFFIX}")


def put_in_place(partial: Path, path: Path) -> None:
    """Give a finished file its name, in place of an older one of that name."""
    sync_file(partial)
    partial.replace(path)
    sync_folder(path.parent)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a small file; readers see the old content or the new, never a part."""
    partial = partial_path(path)
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    put_in_place(partial, path)


def remove_folder(path: Path) -> None:
    """Remove a folder in one instant: it loses its name first, so a half-deleted one is never taken for whole."""
    if not path.exists():
        return
    doomed = path.with_name(f"{DELETING_PREFIX}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)
