"""rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slime.config.batches import Batch, batch_arithmetic, check_micro_batches
from slime.config.config import Config
from slime.config.errors import ConfigError

SMALL = st.integers(1, 12)
MAYBE = st.one_of(st.none(), st.integers(1, 64))


def config(**values: int | bool | None) -> Config:
    said = {name: value for name, value in values.items() if value is not None}
    return Config.from_values(said, given=frozenset(said))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rollout_batch_size": 4, "n_samples_per_prompt": 8}, Batch(4, 8, 32, 1)),
        ({"rollout_batch_size": 4, "n_samples_per_prompt": 8, "global_batch_size": 8}, Batch(4, 8, 8, 4)),
        ({"rollout_batch_size": 4, "n_samples_per_prompt": 8, "num_steps_per_rollout": 2}, Batch(4, 8, 16, 2)),
        ({"rollout_batch_size": 4, "global_batch_size": 16, "num_steps_per_rollout": 2}, Batch(4, 8, 16, 2)),
        ({"n_samples_per_prompt": 8, "global_batch_size": 16, "num_steps_per_rollout": 2}, Batch(4, 8, 16, 2)),
    ],
    ids=["both", "steps", "global batch", "samples per prompt", "prompts"],
)
def test_a_missing_number_is_derived(values: dict[str, int], expected: Batch) -> None:
    assert batch_arithmetic(config(**values)) == expected


@given(SMALL, SMALL, MAYBE, MAYBE)
def test_the_numbers_multiply_out_or_the_error_shows_what_fits(
    prompts: int, responses: int, total: int | None, steps: int | None
) -> None:
    given_values = config(
        rollout_batch_size=prompts,
        n_samples_per_prompt=responses,
        global_batch_size=total,
        num_steps_per_rollout=steps,
    )
    try:
        batch = batch_arithmetic(given_values)
    except ConfigError as error:
        assert f"--rollout-batch-size {prompts} x --n-samples-per-prompt {responses} = {prompts * responses}" in str(
            error
        )
        assert "Nearest that fits: --" in str(error)
        assert total is not None or steps is not None
    else:
        assert batch.samples == batch.global_batch_size * batch.num_steps_per_rollout
        assert total in (None, batch.global_batch_size)
        assert steps in (None, batch.num_steps_per_rollout)


@given(SMALL, SMALL, st.integers(1, 64))
def test_the_suggested_global_batch_is_right_and_nearest(prompts: int, responses: int, total: int) -> None:
    samples = prompts * responses
    values = {"rollout_batch_size": prompts, "n_samples_per_prompt": responses}
    try:
        batch_arithmetic(config(**values, global_batch_size=total))
    except ConfigError as error:
        suggested = int(str(error).split("Nearest that fits: --global-batch-size ")[1].split(",")[0])
        assert batch_arithmetic(config(**values, global_batch_size=suggested)).global_batch_size == suggested
        assert all(abs(d - total) >= abs(suggested - total) for d in range(1, samples + 1) if samples % d == 0)
    else:
        assert samples % total == 0


@given(SMALL, SMALL, SMALL, st.integers(1, 6))
def test_static_forward_passes_are_shared_evenly_or_refused(
    prompts: int, responses: int, size: int, ranks: int
) -> None:
    asked = config(rollout_batch_size=prompts, n_samples_per_prompt=responses, micro_batch_size=size)
    batch = batch_arithmetic(asked)
    passes = -(-batch.samples // size)
    is_even = passes % ranks == 0 and batch.samples >= ranks
    try:
        check_micro_batches(asked, batch, ranks)
    except ConfigError:
        assert not is_even
    else:
        assert is_even


def test_dynamic_forward_passes_only_need_a_sample_a_rank() -> None:
    asked = config(rollout_batch_size=3, use_dynamic_batch_size=True)
    check_micro_batches(asked, batch_arithmetic(asked), 2)
    with pytest.raises(ConfigError, match="use at least 4"):
        check_micro_batches(asked, batch_arithmetic(asked), 4)
