"""Flags of the evaluation during training."""

from dataclasses import dataclass

from slime.config.flags import flag


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation; a flag that is not given takes the value that training uses."""

    eval_interval: int | None = None
    """Rollouts between evaluations."""
    eval_prompt_data: list[str] | None = flag(None, kind="extend")
    """Name and file of each task: aime aime.jsonl; several pairs, or the flag repeated."""
    eval_config: str | None = None
    """YAML or JSON file that describes the tasks; replaces --eval-prompt-data."""
    eval_function_path: str | None = None
    """Function that evaluates. Default: --rollout-function-path."""
    skip_eval_before_train: bool = False
    """Do not evaluate before the first rollout."""
    eval_input_key: str | None = None
    """Field that holds the prompt."""
    eval_label_key: str | None = None
    """Field with the reference answer."""
    eval_tool_key: str | None = None
    """Field with the tools."""
    n_samples_per_eval_prompt: int = 1
    """Responses for each prompt."""
    eval_temperature: float | None = None
    """Sampling temperature; 0: the likeliest token."""
    eval_top_p: float | None = None
    """Nucleus of the sampling."""
    eval_top_k: int | None = None
    """Sample among this many likeliest tokens."""
    eval_max_response_len: int | None = None
    """Longest response, in tokens."""
    eval_max_prompt_len: int | None = None
    """Prompts longer than this many tokens are left out."""
    eval_min_new_tokens: int | None = None
    """Shortest response, in tokens."""
    eval_max_context_len: int | None = None
    """Longest prompt and response together, in tokens. Default: --rollout-max-context-len."""
    eval_reward_key: str | None = None
    """Entry of a reward mapping that counts. Default: --reward-key."""
