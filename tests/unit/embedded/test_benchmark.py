"""The engine's benchmark runs every way on a tiny model, and its limit can be checked by hand."""

from pathlib import Path

import pytest

from benchmarks.cpu_engine import Limits, main, make_prompts

OTHER_ENGINE = """
import pathlib

class Req:
    def __init__(self, ids, max_new_tokens, ignore_eos):
        self.ids, self.max_new_tokens, self.ignore_eos = ids, max_new_tokens, ignore_eos

class Engine:
    def __init__(self, path, dtype):
        self.log = pathlib.Path(__file__).with_suffix(".log")

    def run(self, requests):
        assert all(request.ignore_eos for request in requests)
        with self.log.open("a") as log:
            print(len(requests), len(requests[0].ids), requests[0].max_new_tokens, file=log)
"""


def test_the_table_has_a_row_for_each_dtype_and_batch(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other.py"
    other.write_text(OTHER_ENGINE)
    small = "--dtype float32 --batch 1 3 --new-tokens 3 --prompt-tokens 9 --stream-mib 4 --quick"
    main(["--model-path", str(tiny_llama), "--against", str(other), *small.split()])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    others = ["generate", "other.py", "limit"]
    assert cells[0] == ["dtype", "batch", "embedded", *others, *(f"to {name}" for name in others)]
    assert [row[:2] for row in cells[2:]] == [["float32", "1"], ["float32", "3"]]
    for row in cells[2:]:
        assert len(row) == len(cells[0]) and all(float(cell) >= 0 for cell in row[1:])
        assert float(row[2]) > 0 and float(row[3]) > 0
    # A warm-up and one turn a batch, with the prompts and the number of tokens that were asked for.
    assert (tmp_path / "other.log").read_text().splitlines() == ["1 9 3", "1 9 3", "3 9 3", "3 9 3"]


def test_the_limit_is_the_slower_of_reading_and_multiplying():
    """100 bytes at 1000 bytes/s are 0.1 s a step; 50 multiply-adds a token at 2000/s pass that from 4 sequences on."""
    limits = Limits(matrix_bytes=100, multiply_adds=50, bandwidth=1000, rate=2000)
    assert limits.tokens_per_s(1) == pytest.approx(10)
    assert limits.tokens_per_s(4) == pytest.approx(40)
    assert limits.tokens_per_s(64) == pytest.approx(40)


def test_neighbours_share_a_prompt():
    prompts = make_prompts(batch=5, group=2, length=7, vocab_size=11)
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] != prompts[4]
    assert {len(prompt) for prompt in prompts} == {7}
