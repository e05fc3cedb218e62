"""`slime diff`: identical runs are, and of different ones the first step, sample and tensor are named."""

import io
import json
import math
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slime.cli import main
from slime.observability.diff import compare_runs
from slime.observability.digests import write_digests
from slime.observability.run_log import RunLog
from slime.observability.samples import MAX_LISTED, sample_row, write_eval_samples, write_samples
from slime.utils.types import Sample

ROOT = Path(__file__).parents[3]


def write_run(folder: Path, num_steps: int = 4, speed: float = 1.0) -> Path:
    log = RunLog(folder, Namespace(no_tensorboard=True), stream=io.StringIO())
    for step in range(-1, num_steps):
        samples = [
            Sample(
                index=4 * step + i, group_index=2 * step + i // 2, prompt=f"{step}+{i}", tokens=[step, i, 7, 8],
                response="ab", response_length=2, reward=float(i), rollout_log_probs=[-0.1 * i - 1e-17, -1 / 3],
                weight_versions=[str(step + 1)],
            )
            for i in range(4)
        ]  # fmt: skip
        ledger = None
        if step >= 0:
            write_samples(folder, step, samples)
            ledger = {"rollout_id": step, "trained": [[0, 2 * step], [0, 2 * step + 1]]}
        write_digests(folder, step + 2, {"a.weight": f"a{step}", "b.weight": f"b{step}"}, step)
        write_eval_samples(folder, step, {"sums": {"samples": samples[:2]}})
        metrics = {"train/loss": 0.1 * step, "eval/sums": 0.5, "perf/step_time": speed}
        log.step(step, metrics | {"rollout/prefix_cache_hit_rate": speed}, ledger)
    log.close()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "a"), write_run(tmp_path / "b", speed=2.0)


def diff(capsys: Any, *words: Any) -> tuple[int, str]:
    code = main(["diff", *map(str, words)])
    return code, "".join(capsys.readouterr())


def change(path: Path, edit: Callable[[dict[str, Any]], Any], line: int = 0) -> None:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    edit(lines[line])
    path.write_text("".join(json.dumps(value) + "\n" for value in lines))


def test_runs_that_differ_in_times_only_are_identical(runs: tuple[Path, Path], capsys: Any) -> None:
    assert diff(capsys, *runs) == (0, "identical through step 3\n")


def test_the_shorter_run_is_compared_whole(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    longer = write_run(tmp_path / "longer", num_steps=6)
    code, text = diff(capsys, runs[0], longer)
    assert code == 0
    assert text == f"identical through step 3\n{runs[0]} ends there; {longer} goes on to step 5\n"


def test_the_first_sample_is_named_with_token_and_values(runs: tuple[Path, Path], capsys: Any) -> None:
    path = runs[1] / "samples" / "rollout_000002.jsonl"
    change(path, lambda row: row["tokens"].__setitem__(3, 99), line=1)
    change(path, lambda row: row.update(reward=0.25), line=3)
    change(runs[1] / "samples" / "rollout_000003.jsonl", lambda row: row.update(reward=9.0))
    code, text = diff(capsys, *runs)
    assert code == 1
    assert text.splitlines() == [
        "identical through step 1",
        "step 2 differs:",
        "  samples: sample 9 (line 2, group 4): tokens, token 3 of 4  (and 1 more)",
        f"    {runs[0]}: 8",
        f"    {runs[1]}: 99",
    ]


def test_a_log_prob_that_differs_in_its_last_bit_is_a_difference(runs: tuple[Path, Path], capsys: Any) -> None:
    path = runs[1] / "samples" / "rollout_000000.jsonl"
    change(path, lambda row: row["log_probs"].__setitem__(1, math.nextafter(-1 / 3, 0)))
    code, text = diff(capsys, *runs)
    assert code == 1 and "sample 0 (line 1, group 0): log_probs, log_prob 1 of 2" in text
    assert "-0.3333333333333333\n" in text and "-0.33333333333333326\n" in text


def test_each_kind_is_named_in_the_order_of_the_step(runs: tuple[Path, Path]) -> None:
    _, b = runs
    change(b / "ledger.jsonl", lambda line: line["trained"].__setitem__(1, [0, 8]), line=1)
    change(b / "samples" / "rollout_000001.jsonl", lambda row: row.update(weight_versions=["1"]))
    change(b / "metrics.jsonl", lambda line: line.update({"train/loss": 0.7, "eval/sums": 0.75}), line=2)
    change(b / "digests" / "version_000003.json", lambda value: value["tensors"].update({"b.weight": "x", "c": "y"}))
    change(b / "samples" / "eval_000001_sums.jsonl", lambda row: row.update(response="ac"))
    comparison = compare_runs(*runs)
    assert (comparison.through, comparison.step) == (0, 1)
    assert [(d.kind, d.where, d.a, d.b, d.more) for d in comparison.differences] == [
        ("prompts", "trained, entry 1 of 2", [0, 3], [0, 8], 0),
        ("samples", "sample 4 (line 1, group 2): weight_versions, weight_version 0 of 1", "2", "1", 0),
        ("metrics", "train/loss", 0.1, 0.7, 0),
        ("weights", "b.weight", "b1", "x", 1),
        ("evaluation samples", "eval_000001_sums: sample 4 (line 1, group 2): response", "ab", "ac", 0),
        ("evaluation metrics", "eval/sums", 0.5, 0.75, 0),
    ]


def test_weights_that_differ_from_the_start_are_the_starts_difference(runs: tuple[Path, Path], capsys: Any) -> None:
    path = runs[1] / "digests" / "version_000001.json"
    change(path, lambda value: value["tensors"].update({"a.weight": "other"}))
    code, text = diff(capsys, *runs)
    assert code == 1 and text.startswith("the start differs:\n  weights: a.weight\n")


def test_a_missing_step_metric_or_file_is_a_difference(runs: tuple[Path, Path]) -> None:
    a, b = runs
    change(b / "metrics.jsonl", lambda line: line.pop("train/loss"), line=4)
    (difference,) = compare_runs(a, b).differences
    assert (difference.where, difference.b) == ("train/loss", "(absent)")
    (b / "samples" / "rollout_000002.jsonl").unlink()
    (difference,) = compare_runs(a, b).differences
    assert (difference.where, difference.a, difference.b) == ("rollout_000002.jsonl", "(present)", "(absent)")
    lines = (b / "metrics.jsonl").read_text().splitlines()
    (b / "metrics.jsonl").write_text("\n".join(lines[:2] + lines[3:]) + "\n")
    comparison = compare_runs(a, b)
    assert comparison.step == 1 and comparison.differences[0].where == "the line of metrics.jsonl"


def test_what_a_run_does_not_have_is_said_and_not_held_against_it(runs: tuple[Path, Path], capsys: Any) -> None:
    shutil.rmtree(runs[1] / "digests")
    code, text = diff(capsys, *runs)
    assert code == 0
    assert f"not compared: weights (digests/), which {runs[1]} has not" in text


def test_the_comparison_as_json(runs: tuple[Path, Path], capsys: Any) -> None:
    change(runs[1] / "metrics.jsonl", lambda line: line.update({"train/loss": 9.0}), line=4)
    code, text = diff(capsys, *runs, "--json")
    told = json.loads(text)
    assert code == 1 and (told["is_identical"], told["through"], told["step"]) == (False, 2, 3)
    assert told["differences"] == [{"kind": "metrics", "where": "train/loss", "a": 0.1 * 3, "b": 9.0, "more": 0}]


def test_wrong_input_is_said_in_words(runs: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    code, text = diff(capsys, runs[0], tmp_path / "nothing")
    assert code == 2 and "There is no folder" in text
    (tmp_path / "empty").mkdir()
    code, text = diff(capsys, runs[0], tmp_path / "empty")
    assert code == 2 and "metrics.jsonl is not there" in text
    (runs[1] / "samples" / "rollout_000001.jsonl").write_text("{")
    code, text = diff(capsys, *runs)
    assert code == 2 and "rollout_000001.jsonl:1 is not JSON" in text


def test_runs_are_compared_without_torch(runs: tuple[Path, Path]) -> None:
    code = (
        "import sys\n"
        "from slime.cli import main\n"
        "assert main(['diff', *sys.argv[1:]]) == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, runs)], check=True, cwd=ROOT, timeout=60)


def test_log_probs_are_read_back_bit_by_bit_and_very_long_ones_have_a_digest(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [-rng.expovariate(1.0) * 10 ** rng.randint(-20, 5) for _ in range(200)]
    path = write_samples(tmp_path, 0, [Sample(tokens=[1], rollout_log_probs=values)])
    assert json.loads(path.read_text())["log_probs"] == values

    many = list(range(MAX_LISTED + 1))
    digest = sample_row(Sample(tokens=many))["tokens"]
    assert digest.startswith(f"{len(many)} numbers, blake2b ")
    assert digest == sample_row(Sample(tokens=list(many)))["tokens"]
    assert digest != sample_row(Sample(tokens=[*many[:-1], 0]))["tokens"]
