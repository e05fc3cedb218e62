"""The configuration: typed frozen dataclasses that are the flags, the rules between them, and `resolve` to a `Plan`."""

from slime.config.config import Config
from slime.config.errors import ConfigError
from slime.config.eval_datasets import EvalDatasetConfig, build_eval_dataset_configs, ensure_dataset_list
from slime.config.files import Files
from slime.config.machine import Machine, look_at_machine
from slime.config.megatron import megatron_fields
from slime.config.plan import Plan
from slime.config.resolve import resolve

__all__ = [
    "Config",
    "ConfigError",
    "EvalDatasetConfig",
    "Files",
    "Machine",
    "Plan",
    "build_eval_dataset_configs",
    "ensure_dataset_list",
    "look_at_machine",
    "megatron_fields",
    "resolve",
]
