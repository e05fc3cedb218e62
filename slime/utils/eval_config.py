"""One evaluation task: its file, its keys and its sampling. Standard library only, so that parsing flags stays light.

A value is looked for in the task, then in the file's `defaults`, then in the run's flags; an explicit `null` counts
as given.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Attribute of a task -> flags that stand in for it, the first that is not None wins.
_FALLBACK_FLAGS: dict[str, tuple[str, ...]] = {
    "n_samples_per_eval_prompt": ("n_samples_per_eval_prompt", "n_samples_per_prompt"),
    "temperature": ("eval_temperature", "rollout_temperature"),
    "top_p": ("eval_top_p", "rollout_top_p"),
    "top_k": ("eval_top_k", "rollout_top_k"),
    "max_response_len": ("eval_max_response_len", "rollout_max_response_len"),
    "stop": ("rollout_stop",),
    "stop_token_ids": ("rollout_stop_token_ids",),
    "min_new_tokens": ("eval_min_new_tokens",),
    "min_eval_samples": (),
    "input_key": ("eval_input_key", "input_key"),
    "label_key": ("eval_label_key", "label_key"),
    "tool_key": ("eval_tool_key", "tool_key"),
    "metadata_key": ("metadata_key",),
    "multimodal_keys": ("multimodal_keys",),
    "apply_chat_template": ("apply_chat_template",),
    "apply_chat_template_kwargs": ("apply_chat_template_kwargs",),
    "custom_rm_path": ("eval_custom_rm_path", "custom_rm_path"),
}


@dataclass
class EvalDatasetConfig:
    """One evaluation task. What is None is left to the engine or the reward function."""

    name: str
    path: str
    n_samples_per_eval_prompt: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_response_len: int | None = None
    min_new_tokens: int | None = None
    min_eval_samples: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    input_key: str | None = None
    label_key: str | None = None
    tool_key: str | None = None
    metadata_key: str | None = None
    multimodal_keys: dict[str, str] | None = None
    apply_chat_template: bool | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = None
    rm_type: str | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)
    # Read by evaluation functions of users only.
    app_service: Any = None
    eval_task_timeout: Any = None
    eval_early_stop_remaining: Any = None
    eval_early_stop_idle_timeout: Any = None
    message_processor: Any = None
    reward_model: Any = None
    remote_environment: Any = None

    def __post_init__(self) -> None:
        if self.metadata_overrides is None:
            self.metadata_overrides = {}
        if not isinstance(self.metadata_overrides, Mapping):
            raise TypeError(
                f"metadata_overrides of the evaluation task {self.name!r} must be a mapping, "
                f"not {type(self.metadata_overrides).__name__}."
            )
        self.metadata_overrides = dict(self.metadata_overrides)
        if self.min_eval_samples is not None and self.min_eval_samples <= 0:
            raise ValueError(
                f"min_eval_samples of the evaluation task {self.name!r} is {self.min_eval_samples}; "
                "give a number above 0 or leave it out."
            )

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """What makes two tasks read the same samples."""
        return (self.name, self.path, self.input_key, self.label_key, self.tool_key, self.metadata_key)

    def inject_metadata(self, sample_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
        """A sample's metadata with this task's reward type and overrides; the given mapping stays as it is."""
        metadata = dict(sample_metadata or {})
        if self.rm_type is not None:
            metadata["rm_type"] = self.rm_type
        metadata.update(self.metadata_overrides)
        return metadata


def ensure_dataset_list(config: Any) -> list[dict[str, Any]]:
    """The tasks of a config file as a list of dicts, from a list or from a mapping name -> settings.

    Raises:
        ValueError: neither of them, or a task without name or path.
    """
    if config is None:
        return []
    if isinstance(config, Mapping):
        tasks = [{"name": name, **dict(settings or {})} for name, settings in config.items()]
    elif isinstance(config, Iterable) and not isinstance(config, str):
        tasks = [_as_task(item) for item in config]
    else:
        raise ValueError(
            f"`datasets` of an evaluation config must be a list of tasks or a mapping name -> task, not {config!r}."
        )
    for task in tasks:
        missing = [key for key in ("name", "path") if not task.get(key)]
        if missing:
            raise ValueError(f"The evaluation task {task!r} has no {' and no '.join(missing)}; each task needs both.")
    return tasks


def _as_task(item: Any) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ValueError(f"An evaluation task must be a mapping with name and path, not {item!r}.")
    return dict(item)


def build_eval_dataset_configs(
    args: Namespace, raw_config: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any] | None = None
) -> list[EvalDatasetConfig]:
    """The evaluation tasks of a run: each value from the task, else `defaults`, else the flags of `args`.

    Raises:
        ValueError: `defaults` has a key that no task can have.
        TypeError: a task has one.
    """
    given_defaults = dict(defaults or {})
    fields = EvalDatasetConfig.__dataclass_fields__
    unknown = sorted(set(given_defaults) - (set(fields) - {"name", "path"}))
    if unknown:
        raise ValueError(
            f"`defaults` of the evaluation config has unknown keys: {', '.join(unknown)}. "
            f"Known: {', '.join(sorted(set(fields) - {'name', 'path'}))}."
        )
    configs = []
    for task in raw_config:
        values = given_defaults | dict(task)
        for name, flags in _FALLBACK_FLAGS.items():
            if name not in values:
                values[name] = next((v for flag in flags if (v := getattr(args, flag, None)) is not None), None)
        configs.append(EvalDatasetConfig(**values))
    return configs
