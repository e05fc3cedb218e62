"""A run whose checkpoint cannot be gone on with ends before it starts anything."""

from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.utils import checkpoint_folder as cf
from tests.unit.arguments.wrong_command_lines import right_command_line


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for iteration in (4, 9):
        cf.begin_save(tmp_path, iteration)
        state = cf.rollout_state_path(tmp_path, iteration)
        state.parent.mkdir(exist_ok=True)
        cf.write_durably(state, "state")
        unfinished = cf.begin_files(tmp_path, iteration)
        for name in ("metadata.json", ".metadata", "common.pt"):
            (unfinished / name).write_text("content")
        cf.commit(tmp_path, iteration, unfinished)
    return tmp_path


def start(files: dict[str, str], words: str) -> object:
    return parse_args(right_command_line(files, words))


def refusal(files: dict[str, str], words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        start(files, words)
    return capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused_with_the_step_to_type(
    files: dict[str, str], checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(files, f"--load {checkpoints}")
    (checkpoints / "iter_0000009" / "common.pt").unlink()
    assert "common.pt is missing. Complete iterations there: 4. To go on from one of them: --ckpt-step 4" in refusal(
        files, f"--load {checkpoints}", capsys
    )
    start(files, f"--load {checkpoints} --ckpt-step 4")
    assert "--ref-ckpt-step 4" in refusal(files, f"--ref-load {checkpoints} --use-kl-loss", capsys)


def test_prompts_are_not_begun_again_unasked(
    files: dict[str, str], checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cf.rollout_state_path(checkpoints, 9).unlink()
    message = refusal(files, f"--load {checkpoints}", capsys)
    assert "global_dataset_state_dict_9.pt is missing" in message and "--ckpt-step 4" in message
    for words in ("--finetune", "--start-rollout-id 3", "--ckpt-step 4"):
        start(files, f"--load {checkpoints} {words}")
