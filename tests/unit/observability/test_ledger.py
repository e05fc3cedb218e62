"""The ledger's check: it must see a gap, a double and a missing rollout, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from slime.cli import main
from slime.observability.ledger import LedgerError, check_ledger

ROWS = 10


def good_lines(num_rollouts: int = 8, start: int = 0) -> list[dict[str, Any]]:
    """Four prompts a rollout from ten rows; the second is dropped, the fourth thrown away."""
    lines = []
    for rollout_id in range(start, start + num_rollouts):
        drawn = [divmod(n, ROWS) for n in range(4 * rollout_id, 4 * rollout_id + 4)]
        a, b, c, d = (list(entry) for entry in drawn)
        epoch, row = drawn[-1]
        lines.append(
            {"rollout_id": rollout_id, "trained": [a, c], "dropped": [b], "discarded": [d], "outstanding": []}
            | {"position": [epoch, row + 1], "rows_per_epoch": ROWS}
        )
    return lines


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_ledger_in_order_is_summed_up(tmp_path: Path, capsys: Any) -> None:
    summary = check_ledger(write(tmp_path, good_lines()))
    assert (summary.num_rollouts, summary.trained, summary.dropped, summary.discarded) == (8, 16, 8, 8)
    assert main(["ledger", str(tmp_path)]) == 0
    assert "16 prompts trained, 8 dropped, 8 discarded, 0 in the buffer; none twice, none missing" in (
        capsys.readouterr().out
    )


def test_a_row_twice_is_found_wherever_it_is(tmp_path: Path) -> None:
    lines = good_lines()
    lines[5]["dropped"].append([0, 2])
    with pytest.raises(LedgerError, match=r"row 2 of epoch 0 is there 2 times \(rollouts 0, 5\)"):
        check_ledger(write(tmp_path, lines))


@pytest.mark.parametrize("fate", ["trained", "dropped", "discarded"])
def test_a_row_that_is_missing_is_named(tmp_path: Path, fate: str) -> None:
    lines = good_lines()
    (epoch, row) = lines[3][fate].pop()
    with pytest.raises(LedgerError, match=f"epoch {epoch} has 9 rows where 10 were handed out \\(missing: {row}\\)"):
        check_ledger(write(tmp_path, lines))


def test_a_row_missing_in_the_epoch_that_runs_is_counted(tmp_path: Path) -> None:
    lines = good_lines(2)
    lines[1]["trained"].pop()
    with pytest.raises(LedgerError, match="epoch 0 has 7 rows where 8 were handed out"):
        check_ledger(write(tmp_path, lines))


def test_what_waits_in_the_buffer_is_no_gap_and_must_not_be_trained_too(tmp_path: Path) -> None:
    lines = good_lines(2)
    lines[1]["outstanding"] = [lines[1]["discarded"].pop()]
    assert check_ledger(write(tmp_path, lines)).outstanding == 1
    lines[1]["outstanding"].append([0, 0])
    with pytest.raises(LedgerError, match="row 0 of epoch 0 is in the buffer and in rollout 0"):
        check_ledger(write(tmp_path, lines))


def test_a_rollout_that_is_missing_or_twice_is_named(tmp_path: Path) -> None:
    lines = good_lines()
    with pytest.raises(LedgerError, match="rollout 3 is followed by rollout 5"):
        check_ledger(write(tmp_path, lines[:4] + lines[5:]))
    with pytest.raises(LedgerError, match="rollout 3 is followed by rollout 3"):
        check_ledger(write(tmp_path, lines[:4] + lines[3:]))


def test_a_run_that_goes_on_from_elsewhere_is_checked_from_its_next_epoch_on(tmp_path: Path) -> None:
    assert check_ledger(write(tmp_path, good_lines(8, start=3))).num_rollouts == 8
    lines = good_lines(8, start=3)
    lines[4]["trained"].pop()
    with pytest.raises(LedgerError, match="has 9 rows where 10"):
        check_ledger(write(tmp_path, lines))


def test_groups_of_unknown_rows_are_counted_and_still_unique(tmp_path: Path) -> None:
    line = {"rollout_id": 0, "trained": [[None, 4], [None, 5]], "dropped": [], "discarded": [], "outstanding": []}
    summary = check_ledger(write(tmp_path, [line]))
    assert summary.unknown == 2 and "gaps unknown" in str(summary)
    line["trained"].append([None, 4])  # type: ignore[attr-defined]
    with pytest.raises(LedgerError, match="group 4 is there 2 times"):
        check_ledger(write(tmp_path, [line]))


def test_no_ledger_and_a_torn_one_are_errors_with_the_place(tmp_path: Path, capsys: Any) -> None:
    assert main(["ledger", str(tmp_path)]) == 1
    assert "ledger.jsonl is not there" in capsys.readouterr().err
    (tmp_path / "ledger.jsonl").write_text('{"rollout_id": 0, "tr')
    with pytest.raises(LedgerError, match=r"ledger\.jsonl:1 is not a whole line"):
        check_ledger(tmp_path)
