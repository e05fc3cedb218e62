"""What a folder of checkpoints holds, and the steps by which a checkpoint comes to count and ceases to.

    {folder}/latest_checkpointed_iteration.txt                    names the newest: 12, or `release` (weights alone)
    {folder}/iter_0000012/                                        Megatron's files, and slime.json: what must be there
    {folder}/rollout/global_dataset_state_dict_12.pt              where the prompts stand
    {folder}/rollout/random_state_12.pt                           random states of the process that generates

A checkpoint counts when the tracker names it (or --ckpt-step does) and its files and rollout state are those that
slime.json lists. Saving goes: rollout state, `.unfinished_iter_0000012`, rename, tracker. Every step is flushed to the
disk before the next, and what an interrupted one leaves behind is ignored, and removed by the next save.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slime.utils.durable import (
    DELETING_PREFIX,
    PARTIAL_SUFFIX,
    remove_folder,
    sync_file,
    sync_folder,
    write_durably,
)

LATEST_FILE = "latest_checkpointed_iteration.txt"
RECORD_FILE = "slime.json"
RELEASE = "release"
_UNFINISHED_PREFIX = ".unfinished_"
_FILES_OF_MEGATRON = ("metadata.json", ".metadata", "common.pt")
_ROLLOUT_STATES = ("global_dataset_state_dict_{}.pt", "random_state_{}.pt")
_GIB = 2**30


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    folder: Path
    """That holds it and others."""
    iteration: int | None
    """The rollout after which it was saved; None for `release`, which holds weights that no run has made."""

    @property
    def path(self) -> Path:
        return self.folder / RELEASE if self.iteration is None else iteration_path(self.folder, self.iteration)


def iteration_path(folder: str | Path, iteration: int) -> Path:
    return Path(folder) / f"iter_{iteration:07d}"


def checkpoint_root(path: str | Path) -> Path:
    """The folder of checkpoints that `path` is, or that it is one checkpoint of."""
    path = Path(path)
    return path.parent if _iteration_of(path.name) is not None or path.name == RELEASE else path


def rollout_state_path(path: str | Path, rollout_id: int) -> Path:
    """Where the data source's state after a rollout lies; `path` as for --load and --save."""
    return checkpoint_root(path) / "rollout" / _ROLLOUT_STATES[0].format(rollout_id)


def random_state_path(path: str | Path, rollout_id: int) -> Path:
    """Where the random states of the rollout manager's process lie."""
    return checkpoint_root(path) / "rollout" / _ROLLOUT_STATES[1].format(rollout_id)


# --- loading ---------------------------------------------------------------------------------------------------------


def find_checkpoint(
    path: str | Path | None, step: int | None = None, *, flag: str = "--ckpt-step"
) -> Checkpoint | None:
    """The checkpoint that is meant, whole; None if `path` is no Megatron checkpoint folder.

    Args:
        path: the folder that holds checkpoints, or one of them in it.
        step: the iteration that is wanted; the tracker's when None.
        flag: how the user would name another step.

    Raises:
        ValueError: it is not there, or damaged; the message says which are whole and what to type.
    """
    if path is None:
        return None
    path = Path(path)
    folder = checkpoint_root(path)
    if folder != path and path.is_dir() and step is None:
        found = Checkpoint(folder, _iteration_of(path.name))
        said_by = str(path)
    elif step is not None and (folder != path or (folder / LATEST_FILE).is_file()):
        found = Checkpoint(folder, step)
        said_by = f"{flag} {step}"
    elif (folder / LATEST_FILE).is_file():
        text = (folder / LATEST_FILE).read_text().strip()
        if not text.isdigit() and text != RELEASE:
            raise ValueError(
                f"{folder / LATEST_FILE} holds {text!r}, which names no iteration. {_ways_out(folder, None, flag)}"
            )
        found = Checkpoint(folder, None if text == RELEASE else int(text))
        said_by = f"{folder / LATEST_FILE} names {text}"
    else:
        return None
    if problem := damage(found):
        raise ValueError(f"{said_by}: {found.path} {problem}. {_ways_out(folder, found.iteration, flag)}")
    return found


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's files, as the end of a sentence; None if it is whole."""
    path = checkpoint.path
    if not path.is_dir():
        return "is not there"
    record = read_record(checkpoint)
    if record is None:
        missing = [name for name in _FILES_OF_MEGATRON if not (path / name).is_file()]
        return f"is no complete checkpoint: it lacks {', '.join(missing)}" if missing else None
    for name, size in record["files"].items():
        if not (path / name).is_file():
            return f"is damaged: {name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"is damaged: {name} has {found} bytes where {size} were written"
    return None


def rollout_state_damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the rollout state that was saved with a checkpoint; None if it is as it was saved."""
    record = read_record(checkpoint)
    for name, saved in ({} if record is None else record["rollout"]).items():
        file = checkpoint.folder / "rollout" / name
        if not file.is_file():
            return f"its rollout state {file} is missing"
        if _digest(file) != saved:
            return f"its rollout state {file} is not the one that was saved with it"
    return None


def check_rollout_state(checkpoint: Checkpoint) -> None:
    """
    Raises:
        ValueError: the rollout state beside a checkpoint is missing or another than was saved with it.
    """
    if problem := rollout_state_damage(checkpoint):
        others = _ways_out(checkpoint.folder, checkpoint.iteration, "--ckpt-step")
        raise ValueError(
            f"{checkpoint.path} cannot be resumed: {problem}, so prompts would be skipped or used twice. {others} Or "
            "take its weights alone with --finetune, which starts from the first prompt."
        )


def read_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What slime.json of a checkpoint says; None if another program made the checkpoint."""
    file = checkpoint.path / RECORD_FILE
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def complete_iterations(folder: str | Path) -> list[int]:
    """Iterations whose files are whole, oldest first, whether the tracker names them or not."""
    return [i for i in _iterations(Path(folder)) if damage(Checkpoint(Path(folder), i)) is None]


def _ways_out(folder: Path, wanted: int | None, flag: str) -> str:
    whole = [i for i in complete_iterations(folder) if i != wanted]
    whole = [i for i in whole if rollout_state_damage(Checkpoint(folder, i)) is None] or whole
    if not whole:
        return f"{folder} holds no other complete checkpoint: give another folder, or move this one away to start over."
    listed = ", ".join(map(str, whole))
    return f"Complete iterations there: {listed}. To go on from one of them: {flag} {whole[-1]}."


def _iterations(folder: Path) -> Iterator[int]:
    if folder.is_dir():
        found = (_iteration_of(path.name) for path in folder.iterdir())
        yield from sorted(iteration for iteration in found if iteration is not None)


def _iteration_of(name: str) -> int | None:
    match = re.fullmatch(r"iter_(\d{7,})", name)
    return int(match[1]) if match else None


# --- saving ----------------------------------------------------------------------------------------------------------


def begin_save(folder: str | Path, iteration: int | None) -> None:
    """Before anything of `iteration` is written: a checkpoint of that number, of an earlier run, no longer counts.

    The tracker goes back to the one before it. Otherwise its files could be found with the new rollout state.
    """
    folder = Path(folder)
    tracker = folder / LATEST_FILE
    if tracker.is_file() and tracker.read_text().strip() == _said(iteration):
        older = [i for i in complete_iterations(folder) if iteration is not None and i < iteration]
        if older:
            write_durably(tracker, f"{older[-1]}\n")
        else:
            tracker.unlink()
            sync_folder(folder)
    for leftover in (folder / "rollout").glob(f"*{PARTIAL_SUFFIX}"):
        leftover.unlink(missing_ok=True)


def begin_files(folder: str | Path, iteration: int | None) -> Path:
    """A new folder for the files of an iteration (None: of `release`), after leftovers of killed saves are removed."""
    folder = Path(folder)
    begin_save(folder, iteration)
    for leftover in [*folder.glob(f"{_UNFINISHED_PREFIX}*"), *folder.glob(f"{DELETING_PREFIX}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    (folder / f"{LATEST_FILE}{PARTIAL_SUFFIX}").unlink(missing_ok=True)
    unfinished = folder / f"{_UNFINISHED_PREFIX}{Checkpoint(folder, iteration).path.name}"
    unfinished.mkdir(parents=True)
    return unfinished


def commit(folder: str | Path, iteration: int | None, unfinished: Path) -> Path:
    """Make the files in `unfinished` the newest checkpoint. Files must have been flushed, but for small ones."""
    folder = Path(folder)
    final = Checkpoint(folder, iteration).path
    for name in _FILES_OF_MEGATRON:
        if (unfinished / name).is_file():
            sync_file(unfinished / name)
    states = [folder / "rollout" / name.format(iteration) for name in _ROLLOUT_STATES]
    record = {
        "iteration": iteration,
        "files": {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())},
        "rollout": {state.name: _digest(state) for state in states if state.is_file()},
    }
    write_durably(unfinished / RECORD_FILE, json.dumps(record, indent=1) + "\n")
    remove_folder(final)
    unfinished.rename(final)
    sync_folder(folder)
    write_durably(folder / LATEST_FILE, f"{_said(iteration)}\n")
    return final


def _said(iteration: int | None) -> str:
    """How the tracker names an iteration."""
    return RELEASE if iteration is None else str(iteration)


def keep_newest(folder: str | Path, count: int, newest: int, protected: Collection[Path] = ()) -> list[int]:
    """Delete all but the `count` newest checkpoints up to `newest`; returns the iterations that went.

    Args:
        newest: the one that was just committed; it and younger ones (of a run that went further) stay.
        protected: paths of checkpoints that the run loads from.
    """
    folder = Path(folder)
    kept = {path.resolve() for path in protected}
    candidates = [i for i in _iterations(folder) if i <= newest]
    doomed = [i for i in candidates[:-count] if i != newest and iteration_path(folder, i).resolve() not in kept]
    for iteration in doomed:
        remove_folder(iteration_path(folder, iteration))
    still_there = set(_iterations(folder))
    for state in (folder / "rollout").glob("*.pt"):
        match = re.fullmatch(r"(?:global_dataset_state_dict|random_state)_(\d+)\.pt", state.name)
        if match and int(match[1]) < newest and int(match[1]) not in still_there:
            state.unlink(missing_ok=True)
    return doomed


def check_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """
    Raises:
        OSError: the file system has not the room for what is about to be written.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise OSError(
            f"{what} needs {needed_bytes / _GIB:.2f} GiB, but {folder} has {free / _GIB:.2f} GiB free. Nothing was "
            "written. Free some space, keep fewer checkpoints with --keep-last N, leave the optimizer out with "
            "--no-save-optim, or choose another folder with --save."
        )


def _digest(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
