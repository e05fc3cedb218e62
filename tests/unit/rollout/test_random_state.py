"""The process that generates continues its random numbers after a resume."""

import random
from pathlib import Path

import numpy as np
import torch

from slime.rollout.random_state import load_random_state, save_random_state
from slime.utils.checkpoint_folder import random_state_path


def _draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), torch.rand(1).item()


def test_draws_go_on_where_the_save_was(tmp_path: Path) -> None:
    _draw()
    save_random_state(str(tmp_path), 3)
    expected = [_draw(), _draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert [_draw(), _draw()] != expected
    load_random_state(str(tmp_path), 3)
    assert [_draw(), _draw()] == expected
    load_random_state(str(tmp_path / "iter_0000003"), 3)
    assert [_draw(), _draw()] == expected, "an iteration's own folder stands for the folder that it is in"


def test_without_a_state_nothing_changes(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_random_state(str(tmp_path), 3)
    load_random_state(None, 3)
    assert torch.rand(1) == expected


def test_the_state_is_plain_data(tmp_path: Path) -> None:
    save_random_state(str(tmp_path), 3)
    assert set(torch.load(random_state_path(tmp_path, 3), weights_only=True)) == {"python", "numpy", "torch"}
