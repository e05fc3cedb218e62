"""Everything the quick start trains on: the model folder, a prompt file and a held-out one.

The task is addition of numbers from 1 to 19, after one worked example:

    2 + 6 = 8
    7 + 12 =

A sum and its twin (7 + 12 and 12 + 7) are always in the same file, so no held-out prompt was seen in training in any
order; the worked example is in neither file.

Run it: `python examples/quickstart/prepare.py --out DIR`.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from model import ensure_model

LARGEST = 19
NUM_HELD_OUT = 200
EXAMPLE = (2, 6)
MODEL_FOLDER = "SmolLM2-135M-Instruct"


def split_sums(seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All ordered pairs but the example's, as (training pairs, held-out pairs); twins stay together.

    The split is the same for every run unless another `seed` is given.
    """
    numbers = range(1, LARGEST + 1)
    twins = [(a, b) for a in numbers for b in numbers if a < b and (a, b) != EXAMPLE]
    random.Random(seed).shuffle(twins)
    held_out = twins[: NUM_HELD_OUT // 2]
    training = twins[NUM_HELD_OUT // 2 :] + [(a, a) for a in numbers]
    return both_orders(training), both_orders(held_out)


def both_orders(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({order for a, b in pairs for order in ((a, b), (b, a))})


def row(a: int, b: int) -> dict[str, str]:
    """One line of a prompt file."""
    x, y = EXAMPLE
    return {"prompt": f"{x} + {y} = {x + y}\n{a} + {b} =", "label": str(a + b)}


def write_rows(path: Path, pairs: Iterable[tuple[int, int]]) -> None:
    path.write_text("".join(json.dumps(row(a, b)) + "\n" for a, b in pairs), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quick start's model folder and prompt files.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the two prompt files")
    parser.add_argument("--without-model", action="store_true", help="write only the prompt files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = split_sums()
    write_rows(args.out / "train.jsonl", training)
    write_rows(args.out / "held_out.jsonl", held_out)
    print(f"data: {len(training)} training prompts, {len(held_out)} held-out prompts in {args.out}")
    if not args.without_model:
        ensure_model(args.out / MODEL_FOLDER)


if __name__ == "__main__":
    main()
