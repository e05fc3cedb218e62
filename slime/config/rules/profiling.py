"""Rules of profiling: what is asked for is recorded in this run."""

from slime.config.config import Config
from slime.config.devices import choose_device
from slime.config.errors import ConfigError

_TRACES = ("profile_target", "profile_step_start", "profile_step_end", "profile_ranks")
_SNAPSHOTS = ("memory_snapshot_num_steps", "memory_snapshot_dir")


def traces_are_asked_for(config: Config) -> None:
    """What is recorded, and when, matters only with a recorder."""
    for dests, switch, is_on in (
        (_TRACES, "--use-pytorch-profiler", config.debug.use_pytorch_profiler),
        (_SNAPSHOTS, "--record-memory-history", config.debug.record_memory_history),
    ):
        alone = [_flag(dest) for dest in dests if dest in config.given]
        if alone and not is_on:
            raise ConfigError(f"{' and '.join(alone)} records nothing without {switch}; add it, or drop them")


def profiled_rollouts_are_run(config: Config) -> None:
    """The rollouts to record are some of the run's."""
    debug, num_rollout = config.debug, config.batch.num_rollout
    if not debug.use_pytorch_profiler:
        return
    start, end = debug.profile_step_start, debug.profile_step_end
    if not 0 <= start < end:
        raise ConfigError(
            f"--profile-step-start {start} and --profile-step-end {end} leave no rollout to record; the end has to be "
            f"larger, e.g. --profile-step-end {max(start, 0) + 1}"
        )
    if num_rollout is not None and start >= num_rollout:
        raise ConfigError(
            f"--use-pytorch-profiler records rollouts {start} to {end - 1}, but --num-rollout {num_rollout} ends the "
            f"run before; type e.g. --profile-step-start {max(num_rollout - 1, 0)} --profile-step-end {num_rollout}"
        )


def memory_history_is_of_a_gpu(config: Config) -> None:
    """The CPU's allocator keeps no history."""
    if config.debug.record_memory_history and choose_device(config).value != "cuda":
        raise ConfigError("--record-memory-history records the GPU's allocator, and this run is on the CPU; drop it")


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


RULES = (traces_are_asked_for, profiled_rollouts_are_run, memory_history_is_of_a_gpu)
