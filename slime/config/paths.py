"""Where a run reads and writes: its folder, its checkpoints, what the actor and the reference start from."""

import os
from dataclasses import dataclass

from slime.config.config import Config
from slime.config.errors import ConfigError


@dataclass(frozen=True)
class RunPaths:
    """Folders of the run; absolute where slime chose them."""

    run_name: str
    run_dir: str
    save: str | None

    @property
    def tensorboard(self) -> str:
        """Where TensorBoard files go unless told otherwise."""
        return self.run_dir


@dataclass(frozen=True)
class Start:
    """What the actor and the reference model start from."""

    load: str | None
    load_is_megatron: bool
    """Whether --load (or the run's own checkpoint) is a Megatron checkpoint: optimizer and step come with it."""
    load_is_hf: bool
    ref_load: str | None
    ckpt_step: int | None
    start_rollout_id: int | None
    reason: str


def run_paths(config: Config) -> RunPaths:
    """The run's folder, and where its checkpoints go if it writes any.

    Raises:
        ConfigError: the run's name is not the name of a folder.
    """
    name = config.run.run_name
    if name is not None and (name in ("", ".", "..") or os.sep in name):
        raise ConfigError(f"--run-name {name!r} is not the name of a folder; put the path into --output-dir")
    if name is None:
        model = os.path.basename(os.path.normpath(config.rollout.hf_checkpoint or "run"))
        is_sft = config.algorithm.loss_type == "sft_loss"
        name = f"{model}-{'sft' if is_sft else config.algorithm.advantage_estimator}-{config.machine.started}"
    run_dir = os.path.normpath(os.path.join(config.machine.working_dir, config.run.output_dir, name))
    save = config.checkpoint.save
    if save is None and (config.checkpoint.save_interval is not None):
        save = os.path.join(run_dir, "checkpoints")
    return RunPaths(name, run_dir, save)


def own_checkpoints(config: Config) -> str:
    """Where an earlier start of the same run left its checkpoints, if it did."""
    paths = run_paths(config)
    return paths.save or os.path.join(paths.run_dir, "checkpoints")


def starting_point(config: Config) -> Start:
    """What the actor loads: --load where it holds a checkpoint, else the run's own newest, --ref-load,
    --hf-checkpoint."""
    checkpoint, files = config.checkpoint, config.files
    own = own_checkpoints(config)
    asked = checkpoint.load
    step = config.megatron.get("ckpt_step")
    load, reason = asked, "--load"
    if asked is None and files.kind(own) == "megatron":
        load, reason = own, "this run's newest checkpoint"
    elif files.kind(asked) not in ("megatron", "huggingface"):
        load, reason = config.rollout.hf_checkpoint, "--hf-checkpoint"
        if checkpoint.ref_load is not None:
            load, reason, step = checkpoint.ref_load, "--ref-load", checkpoint.ref_ckpt_step
        if asked is not None:
            reason += f", as --load {asked} holds no checkpoint yet"
    is_own = reason.startswith(("--load", "this run"))
    resumes = is_own and files.kind(load) == "megatron"
    first = config.batch.start_rollout_id
    return Start(
        load=load,
        load_is_megatron=resumes,
        load_is_hf=files.kind(load) == "huggingface",
        ref_load=_reference(config, load, is_resumed=resumes and load in (own, checkpoint.save)),
        ckpt_step=step,
        start_rollout_id=first if first is not None or resumes else 0,
        reason=reason,
    )


def _reference(config: Config, load: str | None, *, is_resumed: bool) -> str | None:
    """--ref-load; with a KL term and without that flag, what the actor started from at first."""
    if config.checkpoint.ref_load is not None or not config.uses_reference:
        return config.checkpoint.ref_load
    return config.rollout.hf_checkpoint if is_resumed else load
