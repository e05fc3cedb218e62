"""Which iteration of a checkpoint folder is meant."""

from pathlib import Path

import pytest

from slime.backends.megatron.checkpoint import LATEST_FILE, find_iteration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for iteration in (3, 7):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    (tmp_path / LATEST_FILE).write_text("7")
    return tmp_path


def test_the_newest_unless_one_is_asked_for(folder: Path) -> None:
    assert find_iteration(folder) == (str(folder), 7)
    assert find_iteration(folder, 3) == (str(folder), 3)


def test_an_iteration_may_be_named_by_its_own_folder(folder: Path) -> None:
    assert find_iteration(folder / "iter_0000003") == (str(folder), 3)


def test_what_is_not_there_is_refused_with_what_is(folder: Path) -> None:
    with pytest.raises(ValueError, match="no iteration 5; there are: iter_0000003, iter_0000007"):
        find_iteration(folder, 5)


def test_another_folder_holds_no_iteration(tmp_path: Path) -> None:
    assert find_iteration(tmp_path) == (str(tmp_path), None)
    assert find_iteration(None) == ("", None)
