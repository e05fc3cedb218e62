"""Rules of checkpoints and of the ways that weights travel."""

from slime.config.config import Config
from slime.config.errors import ConfigError


def disk_transport_has_a_folder(config: Config) -> None:
    """Weights that go through files need a folder."""
    w = config.weight_sync
    if w.update_weight_transport == "disk" and w.update_weight_disk_dir is None:
        raise ConfigError(
            "--update-weight-transport disk needs a folder that every engine sees; add --update-weight-disk-dir DIR"
        )


def delta_goes_through_files(config: Config) -> None:
    """Deltas are files that are applied to a local checkpoint."""
    w = config.weight_sync
    if w.update_weight_mode != "delta":
        return
    if w.update_weight_transport != "disk":
        raise ConfigError(
            f"--update-weight-mode delta goes through files, not {w.update_weight_transport}; "
            "add --update-weight-transport disk"
        )
    if config.cluster.colocate:
        raise ConfigError("--update-weight-mode delta is for engines on other devices; drop --colocate or use full")
    if w.update_weight_local_checkpoint_dir is None:
        raise ConfigError(
            "--update-weight-mode delta changes a checkpoint on each engine's host; "
            "add --update-weight-local-checkpoint-dir DIR"
        )


def released_trainer_can_come_back(config: Config) -> None:
    """A trainer that ends between steps lives on in its checkpoint."""
    if not config.train.release_train:
        return
    w = config.weight_sync
    reasons = [
        text
        for text, is_wrong in (
            ("has no place for a critic (--advantage-estimator ppo)", config.algorithm.advantage_estimator == "ppo"),
            ("forgets the old actor (drop --keep-old-actor)", config.rollout.keep_old_actor),
            ("needs --save DIR to come back from", config.checkpoint.save is None),
            ("needs --update-weight-mode full", w.update_weight_mode != "full"),
            ("needs --update-weight-transport disk", w.update_weight_transport != "disk"),
        )
        if is_wrong
    ]
    if reasons:
        raise ConfigError(f"--release-train {'; it '.join(reasons)}")


def loaded_checkpoint_is_trained(config: Config) -> None:
    """--load with contents must be a checkpoint; a missing or empty folder is where a first run starts."""
    path = config.checkpoint.load
    if path is not None and config.files.kind(path) == "empty" and path != config.checkpoint.save:
        raise ConfigError(
            f"--load {path}: holds neither a Megatron checkpoint (latest_checkpointed_iteration.txt) nor a "
            "HuggingFace model (config.json); give a checkpoint, or leave the flag out to start from --hf-checkpoint"
        )


RULES = (
    disk_transport_has_a_folder,
    delta_goes_through_files,
    released_trainer_can_come_back,
    loaded_checkpoint_is_trained,
)
