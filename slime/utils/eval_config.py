"""Evaluation tasks, under the path by which plug-ins import them; they live in `slime.config.eval_datasets`."""

from slime.config.eval_datasets import EvalDatasetConfig, build_eval_dataset_configs, ensure_dataset_list

__all__ = ["EvalDatasetConfig", "build_eval_dataset_configs", "ensure_dataset_list"]
