"""Prompt files for GSM8K: grade-school questions whose whole-number answer a response has to put into \\boxed{}.

    python examples/gsm8k/prepare.py --out DIR                 # downloads both splits (5 MB, MIT licence)
    python examples/gsm8k/prepare.py --out DIR --source DIR    # from gsm8k-train.jsonl and gsm8k-test.jsonl there

A row of the source has `question` and `answer`, whose last line is `#### 1,234`. A row of DIR/train.jsonl and
DIR/test.jsonl has `prompt`, the question followed by the instruction, and `label`, the answer without commas.
GSM8K: Cobbe et al., arXiv:2110.14168.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path

INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{split}.jsonl"
ROWS = {"train": 7473, "test": 1319}
_MARK = "#### "


def row(source: dict[str, str]) -> dict[str, str]:
    """One line of a prompt file.

    Raises:
        ValueError: the answer does not end in a line `#### number`.
    """
    _, mark, number = source["answer"].rpartition(_MARK)
    if not mark or "\n" in number.strip():
        raise ValueError(f"this row's answer does not end in a line '{_MARK}number': {source['answer'][-80:]!r}")
    return {"prompt": source["question"] + INSTRUCTION, "label": number.strip().replace(",", "")}


def read_split(split: str, source: Path | None) -> list[str]:
    if source is not None:
        return (source / f"gsm8k-{split}.jsonl").read_text(encoding="utf-8").splitlines()
    with urllib.request.urlopen(URL.format(split=split), timeout=60) as reply:
        return str(reply.read().decode("utf-8")).splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.jsonl and test.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two prompt files")
    parser.add_argument("--source", type=Path, help="folder with gsm8k-train.jsonl and gsm8k-test.jsonl")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, num_rows in ROWS.items():
        lines = read_split(split, args.source)
        if len(lines) != num_rows:
            sys.exit(f"{split}: {len(lines)} rows, but GSM8K has {num_rows}; the file is not whole.")
        rows = [json.dumps(row(json.loads(line))) for line in lines]
        (args.out / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{args.out / split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
