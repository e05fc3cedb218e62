"""The data sets that a run evaluates on: from `--eval-prompt-data` pairs or a YAML/JSON file with shared defaults."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slime.config.errors import ConfigError, did_you_mean

# Field of a data set -> attributes of args that it falls back to; the first that is not None counts.
FALLBACKS: dict[str, tuple[str, ...]] = {
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
    """One data set to evaluate on; None where nothing was said.

    Raises:
        TypeError: `metadata_overrides` is not a mapping.
        ValueError: `min_eval_samples` is not positive.
    """

    name: str
    path: str
    rm_type: str | None = None
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
    multimodal_keys: dict[str, Any] | None = None
    apply_chat_template: bool | None = None
    apply_chat_template_kwargs: dict[str, Any] | None = None
    custom_rm_path: str | None = None
    custom_generate_function_path: str | None = None
    app_service: Any = None
    eval_task_timeout: float | None = None
    eval_early_stop_remaining: int | None = None
    eval_early_stop_idle_timeout: float | None = None
    message_processor: Any = None
    reward_model: Any = None
    remote_environment: Any = None
    metadata_overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metadata_overrides is None:
            self.metadata_overrides = {}
        if not isinstance(self.metadata_overrides, Mapping):
            raise TypeError(
                f"eval dataset {self.name}: metadata_overrides is {self.metadata_overrides!r}, not a mapping; "
                "write it as {key: value}"
            )
        if self.min_eval_samples is not None and self.min_eval_samples <= 0:
            raise ValueError(
                f"eval dataset {self.name}: min_eval_samples is {self.min_eval_samples}; it must be at least 1"
            )

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """What tells two loaded data sets apart."""
        return (self.name, self.path, self.input_key, self.label_key, self.tool_key, self.metadata_key)

    def inject_metadata(self, metadata: dict[str, Any] | None) -> dict[str, Any]:
        """A sample's metadata with this data set's `rm_type` and `metadata_overrides` over it."""
        merged = dict(metadata or {})
        if self.rm_type is not None:
            merged["rm_type"] = self.rm_type
        return merged | dict(self.metadata_overrides)


def ensure_dataset_list(datasets: Any) -> list[dict[str, Any]]:
    """The `datasets` entry of a file as a list of mappings: a list as it is, a mapping `name: settings` spelled out.

    Raises:
        ConfigError: it is neither, or an entry lacks its name or path.
    """
    if datasets is None:
        return []
    if isinstance(datasets, Mapping):
        items = [{"name": name, **(settings or {})} for name, settings in datasets.items()]
    elif isinstance(datasets, list):
        items = datasets
    else:
        raise ConfigError(f"--eval-config: `datasets` is {datasets!r}; write a list of {{name, path}} entries")
    for number, item in enumerate(items, 1):
        missing = [key for key in ("name", "path") if not (isinstance(item, Mapping) and item.get(key))]
        if missing:
            raise ConfigError(
                f"--eval-config: data set {number} ({item!r}) has no {' and no '.join(missing)}; "
                "write for example {name: aime, path: aime.jsonl}"
            )
    return [dict(item) for item in items]


def build_eval_dataset_configs(
    args: Any, raw_datasets: Any, defaults: Mapping[str, Any] | None = None
) -> list[EvalDatasetConfig]:
    """Data sets with every gap filled: the data set's own value, then `defaults`, then `args` (see `FALLBACKS`).

    An explicit None in a data set or in `defaults` is kept.

    Args:
        args: anything with (some of) the attributes of `args`.
        raw_datasets: what a file has under `datasets`.
        defaults: what it has under `defaults`.

    Raises:
        ValueError: `defaults` has a key that no data set knows.
        TypeError: a data set has one.
    """
    defaults = dict(defaults or {})
    known = {f.name for f in dataclasses.fields(EvalDatasetConfig)}
    if unknown := set(defaults) - (known - {"name", "path"}):
        raise ValueError(
            f"unknown keys in the eval defaults: {sorted(unknown)}; known are {sorted(known - {'name', 'path'})}"
        )
    configs = []
    for item in ensure_dataset_list(raw_datasets):
        for key in item:
            if key not in known:
                raise TypeError(f"eval dataset {item['name']}: unknown key {key!r}.{did_you_mean(key, known)}")
        values = defaults | item
        for name, attributes in FALLBACKS.items():
            if name not in values:
                fallbacks = (getattr(args, a, None) for a in attributes)
                values[name] = next((v for v in fallbacks if v is not None), None)
        configs.append(EvalDatasetConfig(**values))
    return configs


def read_eval_config(path: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Data sets and defaults of a YAML or JSON file, under `eval:` or at its root.

    Raises:
        ConfigError: the file is missing or is not such a file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--eval-config {path}: {error.strerror}; give an existing YAML or JSON file") from None
    root = _read_json(text, path) if path.endswith(".json") else read_yaml(text, f"--eval-config {path}")
    if isinstance(root, Mapping) and "eval" in root:
        root = root["eval"]
    if not isinstance(root, Mapping) or "datasets" not in root:
        raise ConfigError(
            f"--eval-config {path}: has no `datasets`; write for example "
            "`eval: {datasets: [{name: aime, path: aime.jsonl}]}`"
        )
    return ensure_dataset_list(root["datasets"]), dict(root.get("defaults") or {})


def _read_json(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--eval-config {path}: line {error.lineno} is not JSON: {error.msg}") from None


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML; `source` is how an error calls it (flag and file)."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {error}") from None


def eval_datasets_of(args: Any) -> list[EvalDatasetConfig]:
    """The data sets that `args` asks for: `--eval-config`, else the pairs of `--eval-prompt-data`.

    Raises:
        ConfigError: the file, or the pairs, cannot be read.
    """
    if args.eval_config:
        datasets, defaults = read_eval_config(args.eval_config)
        try:
            return build_eval_dataset_configs(args, datasets, defaults)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"--eval-config {args.eval_config}: {error}") from None
    words = args.eval_prompt_data
    if not words:
        return []
    if len(words) == 1:
        words = ["aime", words[0]]
    if len(words) % 2:
        raise ConfigError(
            f"--eval-prompt-data has {len(words)} words ({' '.join(words)}), which are no pairs of name and file; "
            "write for example --eval-prompt-data aime aime.jsonl gsm8k gsm8k.jsonl"
        )
    pairs = list(zip(words[::2], words[1::2], strict=True))
    names = [name for name, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--eval-prompt-data names {sorted(twice)} twice; each task needs a name of its own")
    return build_eval_dataset_configs(args, [{"name": name, "path": path} for name, path in pairs])
