"""A checkpoint counts when all of it is on the disk, and however a save is killed, what counted before still does."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from slime.utils import checkpoint_folder as cf
from slime.utils.checkpoint_folder import Checkpoint, find_checkpoint


def write_iteration(folder: Path, iteration: int, text: str = "", **keywords: object) -> None:
    """A save of rollout `iteration` as the manager and then the trainer make it, with files that say which save."""
    rollout = folder / "rollout"
    cf.begin_save(folder, iteration)
    rollout.mkdir(parents=True, exist_ok=True)
    for path in (cf.rollout_state_path(folder, iteration), cf.random_state_path(folder, iteration)):
        cf.write_durably(path, f"rollout state {iteration} {text}")
    unfinished = cf.begin_files(folder, iteration)
    for name in ("metadata.json", ".metadata", "common.pt", "__0_0.distcp"):
        (unfinished / name).write_text(f"{name} {iteration} {text}")
    cf.commit(folder, iteration, unfinished)
    if keywords:
        cf.keep_newest(folder, newest=iteration, **keywords)  # type: ignore[arg-type]


def loaded(folder: Path) -> tuple[int, str] | None:
    """What a run would resume from: the iteration and the save that made it; refuses a mixture of two saves."""
    found = find_checkpoint(folder)
    if found is None:
        return None
    assert found.iteration is not None
    cf.check_rollout_state(found)
    texts = [file.read_text() for file in found.path.iterdir() if file.name != cf.RECORD_FILE]
    texts += [path(folder, found.iteration).read_text() for path in (cf.rollout_state_path, cf.random_state_path)]
    saves = {text.split()[-1] for text in texts}
    assert len(saves) == 1 and len(texts) == 6, texts
    return found.iteration, saves.pop()


@pytest.fixture(autouse=True)
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files and folders in the order in which they are flushed; not done here: a killed process loses nothing that it
    has written, a machine without power would."""
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    return flushed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for iteration in (3, 7):
        write_iteration(tmp_path, iteration, "first")
    return tmp_path


# --- what is found ---------------------------------------------------------------------------------------------------


def test_the_newest_unless_one_is_asked_for(folder: Path) -> None:
    assert find_checkpoint(folder) == Checkpoint(folder, 7)
    assert find_checkpoint(folder, 3) == Checkpoint(folder, 3)
    assert find_checkpoint(folder / "iter_0000003") == Checkpoint(folder, 3)
    assert find_checkpoint(folder / "iter_0000003", 7) == Checkpoint(folder, 7)


def test_an_iteration_that_is_whole_but_not_named_does_not_count(folder: Path) -> None:
    """The process was killed between the two renames of its save."""
    (folder / cf.LATEST_FILE).write_text("3\n")
    assert find_checkpoint(folder) == Checkpoint(folder, 3)
    (folder / cf.LATEST_FILE).unlink()
    assert find_checkpoint(folder) is None


def test_another_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path, 5) is None
    assert find_checkpoint(tmp_path / "nothing") is None
    assert find_checkpoint(None) is None


def test_weights_alone_are_called_release(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    for name in ("metadata.json", ".metadata", "common.pt"):
        (tmp_path / "release" / name).touch()
    (tmp_path / cf.LATEST_FILE).write_text("release")
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path / "release") == Checkpoint(tmp_path, None)


def _lose_a_file(path: Path) -> None:
    (path / "common.pt").unlink()


def _cut_a_file(path: Path) -> None:
    with open(path / "__0_0.distcp", "r+") as file:
        file.truncate(4)


def _lose_it_all(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def _lose_the_record(path: Path) -> None:
    (path / cf.RECORD_FILE).unlink()
    (path / ".metadata").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (_lose_a_file, "is damaged: common.pt is missing"),
        (_cut_a_file, "is damaged: __0_0.distcp has 4 bytes where 20 were written"),
        (_lose_it_all, "is not there"),
        (_lose_the_record, "is no complete checkpoint: it lacks .metadata"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_step_to_go_on_from(
    folder: Path, harm: Callable[[Path], None], words: str
) -> None:
    harm(folder / "iter_0000007")
    with pytest.raises(ValueError, match=words) as raised:
        find_checkpoint(folder)
    assert "names 7" in str(raised.value)
    assert str(raised.value).endswith("Complete iterations there: 3. To go on from one of them: --ckpt-step 3.")
    assert find_checkpoint(folder, 3) == Checkpoint(folder, 3)


def test_a_tracker_that_names_nothing_is_refused(folder: Path) -> None:
    (folder / cf.LATEST_FILE).write_text("")
    with pytest.raises(ValueError, match="holds '', which names no iteration. .*--ref-ckpt-step 7"):
        find_checkpoint(folder, flag="--ref-ckpt-step")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ValueError, match="--ckpt-step 5: .*iter_0000005 is not there. Complete iterations there: 3, 7"):
        find_checkpoint(folder, 5)


def test_a_rollout_state_that_is_lost_or_another_is_refused(folder: Path) -> None:
    state = cf.rollout_state_path(folder, 7)
    state.write_text(state.read_text() + "!")
    found = find_checkpoint(folder)
    assert found is not None
    with pytest.raises(ValueError, match=r"is not the one that was saved with it.*--ckpt-step 3.*--finetune"):
        cf.check_rollout_state(found)
    state.unlink()
    with pytest.raises(ValueError, match=r"global_dataset_state_dict_7.pt is missing.*--ckpt-step 3"):
        cf.check_rollout_state(found)
    cf.check_rollout_state(Checkpoint(folder, 3))


# --- a save that is killed -------------------------------------------------------------------------------------------

_STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def _killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do the work in a fork that SIGKILLs itself before its `step`-th touch of the disk; whether it got that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill_at_step(event: str, _: tuple[object, ...]) -> None:
            nonlocal count
            if event in _STEPS:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill_at_step)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("iteration", [9, 7, 3], ids=["a new one", "the newest again", "an old one again"])
def test_a_save_may_be_killed_at_every_step(tmp_path: Path, iteration: int) -> None:
    """What counts afterwards is a whole save: the one before, or the new one; and the next save cleans up."""
    step, survived = 0, set()
    while True:
        step += 1
        folder = tmp_path / str(step)
        for old in (3, 7):
            write_iteration(folder, old, "first")
        was_killed = _killed_at(step, lambda: write_iteration(folder, iteration, "second"))  # noqa: B023
        survived.add(loaded(folder))
        write_iteration(folder, iteration, "third", count=2)
        assert loaded(folder) == (iteration, "third")
        assert not [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".metadata"]
        assert not list(folder.rglob("*.partial"))
        if not was_killed:
            break
    assert step > 20
    before = {9: (7, "first"), 7: (3, "first"), 3: (7, "first")}[iteration]
    untouched = {(7, "first")}
    assert survived == untouched | {before, (iteration, "second")}


def test_deleting_old_checkpoints_may_be_killed_at_every_step(tmp_path: Path) -> None:
    step, was_killed = 0, True
    while was_killed:
        step += 1
        folder = tmp_path / str(step)
        for iteration in range(5):
            write_iteration(folder, iteration, "first")
        was_killed = _killed_at(step, lambda: cf.keep_newest(folder, 2, 4) and None)  # type: ignore[func-returns-value]  # noqa: B023
        assert loaded(folder) == (4, "first")
        for iteration in cf.complete_iterations(folder):
            cf.check_rollout_state(Checkpoint(folder, iteration))
        write_iteration(folder, 5, "second", count=2)
        assert cf.complete_iterations(folder) == [4, 5]
        assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
            "iter_0000004", "iter_0000005", "rollout",
        ]  # fmt: skip
        assert len(list((folder / "rollout").iterdir())) == 4
    assert step > 10


def test_a_save_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL from outside, at random moments of a process that does nothing but save."""
    seed = random.randrange(2**32)
    print("seed of the moments:", seed)
    moments = random.Random(seed)
    newest = -1
    for _ in range(20):
        child = os.fork()
        if child == 0:
            for iteration in range(newest + 1, newest + 500):
                write_iteration(tmp_path, iteration, "only", count=3)
            os._exit(0)
        time.sleep(moments.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = loaded(tmp_path)
        assert found is None or found[0] >= newest
        newest = newest if found is None else found[0]
    assert newest > 0


def test_everything_is_flushed_before_the_name_that_makes_it_count(
    tmp_path: Path, flushes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer of a large file flushes it itself; all else is flushed here."""
    rename = Path.rename
    counted_before: list[int] = []

    def noted(path: Path, target: Path) -> Path:
        counted_before.append(len(flushes))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", noted)
    write_iteration(tmp_path, 4)
    (at_the_rename,) = counted_before
    before = [Path(path).relative_to(tmp_path) for path in flushes[:at_the_rename]]
    unfinished = Path(".unfinished_iter_0000004")
    for name in ("common.pt", ".metadata", "metadata.json", "slime.json.partial"):
        assert unfinished / name in before
    assert before[-1] == unfinished, "the names in it"
    assert Path("rollout/global_dataset_state_dict_4.pt.partial") in before and Path("rollout") in before
    after = [str(Path(path).relative_to(tmp_path)) for path in flushes[at_the_rename:]]
    assert after == [".", f"{cf.LATEST_FILE}.partial", "."]


# --- old ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "newest", "protected", "expected"),
    [
        (2, 5, (), [4, 5]),
        (1, 5, (), [5]),
        (9, 5, (), [0, 1, 2, 3, 4, 5]),
        (2, 3, (), [2, 3, 4, 5]),  # the run went back and younger ones are another's
        (2, 5, (0, 2), [0, 2, 4, 5]),
    ],
)
def test_the_newest_checkpoints_and_those_in_use_are_kept(
    tmp_path: Path, count: int, newest: int, protected: Collection[int], expected: list[int]
) -> None:
    for iteration in range(6):
        write_iteration(tmp_path, iteration)
    in_use = [cf.iteration_path(tmp_path, iteration) for iteration in protected]
    gone = cf.keep_newest(tmp_path, count, newest, in_use)
    assert cf.complete_iterations(tmp_path) == expected
    assert sorted([*gone, *expected]) == list(range(6))
    for iteration in expected:
        cf.check_rollout_state(Checkpoint(tmp_path, iteration))
    assert len(list((tmp_path / "rollout").iterdir())) == 2 * len(expected)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    cf.check_space(tmp_path / "not" / "yet" / "there", 1, "The checkpoint")
    with pytest.raises(OSError, match=r"The checkpoint needs 1048576\.00 GiB, but .* has [\d.]+ GiB free.*--keep-last"):
        cf.check_space(tmp_path, 2**50, "The checkpoint")


def test_the_record_lists_what_must_be_there(folder: Path) -> None:
    record = json.loads((folder / "iter_0000007" / cf.RECORD_FILE).read_text())
    assert record["iteration"] == 7
    assert record["files"]["__0_0.distcp"] == len("__0_0.distcp 7 first")
    assert sorted(record["rollout"]) == ["global_dataset_state_dict_7.pt", "random_state_7.pt"]
