"""What is not built is refused by name, and what is refused is a flag."""

import pathlib
import re

import pytest

from slime.arguments import parse_args
from slime.arguments.parser import slime_flags
from slime.config.unbuilt import UNBUILT
from tests.unit.arguments.wrong_command_lines import right_command_line

PACKAGE = pathlib.Path(__file__).parents[3] / "slime"
READ_BY_PLUG_INS_ALONE = {
    "max_turns", "rollout_buffer_url", "fetch_trajectory_retry_times", "min_batch_collection_ratio", "rollout_task_type"
}  # fmt: skip
WITHOUT_EFFECT_BY_DESIGN = {
    "check_weight_update_equal",  # the proof is always on
    "use_tensorboard",  # on by default
    "train_backend",  # one choice
}
DETAILS_OF_WHAT_IS_REFUSED = {
    "mtp_loss_scaling_factor", "opd_teacher_ckpt_step", "opd_teacher_load", "qwen_gdn_backend",
    "rollout_health_check_first_wait", "rollout_health_check_interval", "rollout_health_check_timeout",
    "update_weight_delta_checksum", "update_weight_delta_encoding",
}  # fmt: skip


def test_an_unbuilt_flag_ends_the_start_with_what_to_do_instead(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(right_command_line(files, "--use-fault-tolerance --async-buffer-size 4"))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "--use-fault-tolerance is not built yet" in message
    assert "--async-buffer-size 4 is not built yet" in message


def test_every_refused_name_is_a_flag() -> None:
    assert set(UNBUILT) <= {flag.dest for flag in slime_flags()}


def test_every_other_flag_is_read_somewhere() -> None:
    """A flag that nothing reads would be accepted and do nothing."""
    declared = ("config/groups", "config/rules", "config/unbuilt.py")
    files = [file for file in PACKAGE.rglob("*.py") if not str(file.relative_to(PACKAGE)).startswith(declared)]
    words = set(re.findall(r"\w+", "\n".join(file.read_text() for file in files)))
    unread = {flag.dest for flag in slime_flags()} - words
    excused = READ_BY_PLUG_INS_ALONE | WITHOUT_EFFECT_BY_DESIGN | DETAILS_OF_WHAT_IS_REFUSED
    assert unread - set(UNBUILT) - excused == set()
