"""Flags of the prompts and of the batches made from them."""

from dataclasses import dataclass
from typing import Any, Literal

from slime.config.flags import flag


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    prompt_data: str | None = None
    """Prompts: a .jsonl or .parquet file; `file@[start:end]` takes a slice of its rows."""
    input_key: str = "input"
    """Field of a row that holds the prompt. Default: `prompt` if the first row has it."""
    label_key: str | None = None
    """Field with the reference answer. Default: `label` if the first row has it."""
    multimodal_keys: dict[str, Any] | None = None
    """Fields with images or other media, as JSON: {"image": "images"}."""
    metadata_key: str = "metadata"
    """Field with a mapping that becomes the sample's metadata."""
    tool_key: str = "tools"
    """Field with the tools that the chat template shows."""
    apply_chat_template: bool = False
    """Put prompts through the tokenizer's chat template."""
    apply_chat_template_kwargs: dict[str, Any] = flag({})
    """Extra arguments of the chat template, as JSON."""
    data_source_path: str = "slime.rollout.data_source.RolloutDataSourceWithBuffer"
    """Class that hands out prompts: Cls(args)."""
    rollout_global_dataset: bool = flag(True, names=("--disable-rollout-global-dataset",), kind="switch_off")
    """Do not keep a data set in the rollout manager; the rollout function finds its own prompts."""
    num_data_workers: int = 0
    """Processes that prepare prompts; 0: in the rollout manager."""
    streaming_data: bool = False
    """Read the prompt file while the run goes, without counting its rows; an epoch ends with the file."""
    loss_mask_type: Literal["qwen", "qwen3", "qwen3_5", "distill_qwen"] = "qwen"
    """How the trained tokens of a conversation are found (supervised fine-tuning)."""


@dataclass(frozen=True)
class BatchConfig:
    """Batches and steps: rollout_batch_size x n_samples_per_prompt = global_batch_size x num_steps_per_rollout."""

    num_rollout: int | None = None
    """Rollouts of the run; this or --num-epoch is required. 0: only evaluate."""
    num_epoch: int | None = None
    """Passes over the prompts, when --num-rollout is not given."""
    start_rollout_id: int | None = None
    """First rollout. Default: what the loaded checkpoint says, else 0."""
    rollout_batch_size: int | None = None
    """Prompts in one rollout. Required."""
    n_samples_per_prompt: int = 1
    """Responses for each prompt."""
    global_batch_size: int | None = None
    """Samples in one optimizer step. Default: a rollout's samples / --num-steps-per-rollout."""
    num_steps_per_rollout: int | None = None
    """Optimizer steps in one rollout. Default: a rollout's samples / --global-batch-size, or 1."""
    micro_batch_size: int = 1
    """Samples in one forward pass, without --use-dynamic-batch-size."""
    use_dynamic_batch_size: bool = False
    """Fill each forward pass with samples up to --max-tokens-per-gpu."""
    max_tokens_per_gpu: int | None = None
    """Tokens of one forward pass on one device."""
    log_probs_max_tokens_per_gpu: int | None = None
    """The same for passes without a gradient. Default: --max-tokens-per-gpu."""
    data_pad_size_multiplier: int = 128
    """On GPUs a packed batch is padded to a multiple of this times the tensor parallel size, in tokens."""
    share_group_prompts: bool = True
    """Compute the prompt that a group's samples share once in a forward pass; the gradient is the same."""
    balance_data: bool = False
    """Share the samples out so that every rank has about the same work."""
    balance_by_flops: bool = False
    """Form the forward passes by their work rather than their tokens; implies --balance-data."""
