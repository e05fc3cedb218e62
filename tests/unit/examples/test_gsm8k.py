"""GSM8K's prompt files: every row becomes a prompt with a plain number as its label, or the file is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PREPARE = Path(__file__).parents[3] / "examples" / "gsm8k" / "prepare.py"


def prepare(tmp_path: Path, answers: list[str], num_test: int = 1319) -> subprocess.CompletedProcess[str]:
    rows = [json.dumps({"question": f"Question {i}?", "answer": answers[i % len(answers)]}) for i in range(7473)]
    (tmp_path / "gsm8k-train.jsonl").write_text("\n".join(rows))
    (tmp_path / "gsm8k-test.jsonl").write_text("\n".join(rows[:num_test]))
    command = [sys.executable, str(PREPARE), "--source", str(tmp_path), "--out", str(tmp_path / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_labels_are_plain_numbers_and_prompts_carry_the_instruction(tmp_path: Path) -> None:
    result = prepare(tmp_path, ["A thousand.\n#### 1,234", "Minus.\n#### -5"])
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows[:2]] == ["1234", "-5"]
    assert rows[0]["prompt"] == (
        "Question 0?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )  # fmt: skip


@pytest.mark.parametrize(("answers", "num_test", "message"), [
    (["no mark"], 1319, "does not end in a line '#### number'"),
    (["x\n#### 5"], 100, "test: 100 rows, but GSM8K has 1319"),
])  # fmt: skip
def test_a_row_without_an_answer_and_a_file_that_is_cut_are_refused(
    tmp_path: Path, answers: list[str], num_test: int, message: str
) -> None:
    result = prepare(tmp_path, answers, num_test)
    assert result.returncode != 0 and message in result.stderr
