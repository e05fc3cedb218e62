"""A wrong command line ends with exit code 2 and a message with the flag and what to type, before anything heavy."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.arguments.parser import _INSTEAD, slime_flags, spellings, table_flags
from tests.unit.arguments.wrong_command_lines import WRONG_COMMAND_LINES, Wrong

HEAVY = ("torch", "ray", "transformers", "megatron", "sglang", "numpy", "sglang_router", "my_plugins")
IN_PROCESS = {wrong.rule: wrong for wrong in WRONG_COMMAND_LINES}
IN_SUBPROCESS = [IN_PROCESS[rule] for rule in (
    "a flag that does not exist",
    "everything missing",
    "a global batch that does not divide",
    "a row that is not JSON",
    "a generate function that cannot be awaited",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that differ from machine to machine are set: no GPU, no SGLang, no cluster."""
    monkeypatch.setattr("slime.config.machine._num_gpus", lambda environ: 0)
    monkeypatch.setattr("slime.config.machine._is_installed", lambda package: False)
    for name in ("RAY_ADDRESS", "SLIME_SGLANG_PYTHON"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("wrong", WRONG_COMMAND_LINES, ids=lambda w: w.rule.replace(" ", "-"))
def test_the_message_has_the_flag_and_the_fix(
    wrong: Wrong, files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(wrong.command_line(files), loop=wrong.loop)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("train.py: error: ")
    assert wrong.flag in message
    assert wrong.fix in message
    assert len(message.splitlines()) == 1, "one mistake gives one message"


def test_each_command_line_breaks_another_rule() -> None:
    assert len(IN_PROCESS) == len(WRONG_COMMAND_LINES) >= 45


def test_arguments_of_servers_that_slime_sets_are_no_flags() -> None:
    names = spellings(flag for flags in (slime_flags(), *table_flags().values()) for flag in flags)
    assert not names & _INSTEAD.keys()
    told = {word for text in _INSTEAD.values() for word in re.findall(r"--[a-z-]+[a-z]", text)}
    assert told <= names


def test_independent_mistakes_are_reported_together(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--rollout-temperature 0 --rm-type maths --gloabl-batch-size 8 --prompt-data {dir}/none.jsonl "
        "--save-interval 1 --save-hf x"
    )
    with pytest.raises(SystemExit) as stopped:
        parse_args(Wrong("", words, "", "").command_line(files))
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("train.py: error: 5 problems\n")
    for part in ("--rollout-temperature", "--rm-type", "--gloabl-batch-size", "none.jsonl", "--save-hf"):
        assert part in message


@pytest.mark.parametrize("wrong", IN_SUBPROCESS, ids=lambda w: w.rule.replace(" ", "-"))
def test_nothing_heavy_is_imported(wrong: Wrong, files: dict[str, str], repository: Path) -> None:
    """A real process; what it imported is written when it ends."""
    driver = (
        "import atexit, sys\n"
        f"heavy = {HEAVY!r}\n"
        "atexit.register(lambda: print('IMPORTED', *[m for m in heavy if m in sys.modules]))\n"
        "from slime.arguments import parse_args\n"
        "parse_args()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-c", driver, *wrong.command_line(files)],
        capture_output=True, text=True, env=environment, cwd=files["dir"], check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert wrong.fix in process.stderr
    assert process.stdout.strip() == "IMPORTED"


def test_train_py_stops_at_a_wrong_command_line(files: dict[str, str], repository: Path) -> None:
    """The program itself, with every module that it loads counted."""
    wrong = IN_PROCESS["too few devices"]
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", *wrong.command_line(files)],
        capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=repository, check=False,
    )  # fmt: skip
    lines = process.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert process.returncode == 2
    assert any(line.startswith("train.py: error: this run needs 16 devices") for line in lines)
    assert not imported & set(HEAVY)
