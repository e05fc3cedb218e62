"""What no default can know, reported in one error."""

from slime.config.config import Config
from slime.config.errors import ConfigError
from slime.config.groups import DataConfig

EXAMPLE = (
    "train.py --hf-checkpoint Qwen3-4B --prompt-data train.jsonl --rm-type math --rollout-batch-size 32 "
    "--n-samples-per-prompt 8 --num-rollout 100"
)


def what_is_missing(config: Config) -> None:
    """Model, prompts, reward, batch size and length of the run must be said; one error lists all that are not."""
    missing = [
        text
        for text, is_missing in (
            ("a model folder (--hf-checkpoint DIR)", config.rollout.hf_checkpoint is None),
            ("prompts (--prompt-data FILE)", _lacks_prompts(config)),
            ("a reward (--rm-type NAME or --custom-rm-path FILE)", _lacks_reward(config)),
            ("the prompts of a rollout (--rollout-batch-size N)", _lacks_batch_size(config)),
            (
                "the length of the run (--num-rollout N or --num-epoch N)",
                config.batch.num_rollout is None and config.batch.num_epoch is None,
            ),
        )
        if is_missing
    ]
    if missing:
        raise ConfigError(f"missing: {'; '.join(missing)}. For example: {EXAMPLE}")


def _lacks_batch_size(config: Config) -> bool:
    """It can be derived from the other three numbers of the batch."""
    batch = config.batch
    derived = batch.global_batch_size and batch.num_steps_per_rollout and "n_samples_per_prompt" in config.given
    return batch.rollout_batch_size is None and not derived


def _lacks_prompts(config: Config) -> bool:
    own_source = (
        config.data.data_source_path != DataConfig.data_source_path
        or not config.data.rollout_global_dataset
        or not config.uses_default_rollout
        or config.rollout.rollout_buffer_url is not None
    )
    saved = config.debug.load_debug_rollout_data is not None
    return config.data.prompt_data is None and not own_source and not saved and config.batch.num_rollout != 0


def _lacks_reward(config: Config) -> bool:
    reward, rollout = config.reward, config.rollout
    if reward.rm_type is not None or reward.custom_rm_path is not None or config.skips_engines:
        return False
    own_code = (
        rollout.custom_generate_function_path is not None
        or rollout.rollout_sample_hook_path
        or not config.uses_default_rollout
        or reward.custom_reward_post_process_path is not None
    )
    is_evaluation_only = config.batch.num_rollout == 0 and all(d.rm_type for d in config.eval_datasets)
    metadata = (config.files.first_row or {}).get(config.data.metadata_key)
    row_names_it = isinstance(metadata, dict) and "rm_type" in metadata
    return not own_code and not row_names_it and not is_evaluation_only and config.algorithm.loss_type != "sft_loss"


RULES = (what_is_missing,)
