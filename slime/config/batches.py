"""The arithmetic of a rollout's batch: rollout_batch_size x n_samples_per_prompt = global_batch_size x steps."""

from dataclasses import dataclass

from slime.config.config import Config
from slime.config.errors import ConfigError

USUAL_RESPONSE_LEN = 1024
"""Tokens of the longest response where neither it nor the context's length is given."""


@dataclass(frozen=True)
class Batch:
    """Counts of one rollout."""

    rollout_batch_size: int
    n_samples_per_prompt: int
    global_batch_size: int
    num_steps_per_rollout: int

    @property
    def samples(self) -> int:
        """Responses of one rollout."""
        return self.rollout_batch_size * self.n_samples_per_prompt


def longest_response(config: Config) -> int:
    """--rollout-max-response-len, or what stands in for it: a request then ends at --rollout-max-context-len."""
    rollout = config.rollout
    return rollout.rollout_max_response_len or rollout.rollout_max_context_len or USUAL_RESPONSE_LEN


def batch_arithmetic(config: Config) -> Batch:
    """The four numbers, a missing one derived.

    Raises:
        ConfigError: they do not multiply out; shows all four and the nearest that fits.
    """
    batch = config.batch
    prompts, responses = batch.rollout_batch_size, batch.n_samples_per_prompt
    total, steps = batch.global_batch_size, batch.num_steps_per_rollout
    if total and steps and "n_samples_per_prompt" not in config.given and prompts:
        if total * steps % prompts == 0:
            responses = total * steps // prompts
    elif total and steps and prompts is None:
        prompts = total * steps // responses
    if prompts is None:
        raise ConfigError("the prompts of a rollout are missing: add --rollout-batch-size N")
    samples = prompts * responses
    if total is None and steps is None:
        steps = 1
    if steps is None:
        assert total is not None
        steps = samples // total
    elif total is None:
        total = samples // steps
    if total is None or steps == 0 or total * steps != samples:
        raise ConfigError(_mismatch(prompts, responses, total or 0, steps, batch.num_steps_per_rollout))
    return Batch(prompts, responses, total, steps)


def _mismatch(prompts: int, responses: int, total: int, steps: int, given_steps: int | None) -> str:
    samples = prompts * responses
    left = f"--rollout-batch-size {prompts} x --n-samples-per-prompt {responses} = {samples} samples"
    if given_steps is not None and total * steps != samples and samples % given_steps:
        nearest = f"--num-steps-per-rollout {_nearest_divisor(samples, given_steps)}"
        return f"{left} do not make --num-steps-per-rollout {given_steps} equal steps. Nearest that fits: {nearest}"
    right = f"--global-batch-size {total} x --num-steps-per-rollout {given_steps or 'N'}"
    if given_steps is not None:
        fits = f"--global-batch-size {samples // given_steps}"
        return f"{left}, but {right} = {total * given_steps}. Nearest that fits: {fits}"
    prompts_that_fit = max(1, round(samples / total)) * total / responses if total else 0
    other = (
        f", or --rollout-batch-size {int(prompts_that_fit)}"
        if prompts_that_fit >= 1 and prompts_that_fit % 1 == 0
        else ""
    )
    return (
        f"{left}, which {right} cannot make: {total} does not divide {samples}. Nearest that fits: "
        f"--global-batch-size {_nearest_divisor(samples, total)}{other}"
    )


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; the larger one of two that are equally near."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), -d))


def check_micro_batches(config: Config, batch: Batch, data_parallel: int) -> None:
    """Every data-parallel rank must get the same number of forward passes in a step.

    Raises:
        ConfigError: it cannot.
    """
    if batch.global_batch_size < data_parallel:
        raise ConfigError(
            f"--global-batch-size {batch.global_batch_size} gives {data_parallel} data-parallel ranks less than one "
            f"sample each; use at least {data_parallel}"
        )
    size = config.batch.micro_batch_size
    makes_own_samples = not config.uses_default_rollout or config.rollout.custom_generate_function_path is not None
    if config.batch.use_dynamic_batch_size or makes_own_samples or config.skips_engines:
        return
    passes = -(-batch.global_batch_size // size)
    if passes % data_parallel:
        multiple = size * data_parallel
        below = batch.global_batch_size // multiple * multiple
        fits = " or ".join(str(n) for n in (below, below + multiple) if n)
        raise ConfigError(
            f"--global-batch-size {batch.global_batch_size} in forward passes of --micro-batch-size {size} cannot be "
            f"shared by {data_parallel} data-parallel ranks; use --use-dynamic-batch-size --max-tokens-per-gpu 9216, "
            f"or a --global-batch-size that is a multiple of {multiple} ({fits})"
        )
