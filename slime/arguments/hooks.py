"""Checks every flag that names a function or class: it is found, and it can be called the way slime will call it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from slime.arguments.signatures import Function, Signature, is_never_awaitable, method_of, signature_of
from slime.arguments.source import Found, find
from slime.config.errors import ConfigError, Problems
from slime.config.flags import default_of
from slime.config.groups import GROUPS

_TIS_KEYWORDS = (
    "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "total_lengths", "response_lengths",
)  # fmt: skip


@dataclass(frozen=True)
class Hook:
    """How slime calls the function of one flag."""

    dest: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    optional_keywords: tuple[str, ...] = ()
    """Passed where the function takes them; they may also be required by it."""
    is_async: bool = False
    default_names: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.dest.replace("_", "-")

    @property
    def call(self) -> str:
        """The call in words, for errors."""
        parts = [*self.positional, *(f"{k}=..." for k in self.keywords)]
        return f"{'async ' if self.is_async else ''}def fn({', '.join(parts)})"


HOOKS = tuple(
    Hook(dest, tuple(positional.split()), **more)
    for dest, positional, more in (
        ("rollout_function_path", "args rollout_id data_source", {"keywords": ("evaluation",)}),
        ("eval_function_path", "args rollout_id data_source", {"keywords": ("evaluation",)}),
        ("rollout_sample_hook_path", "args sample", {"optional_keywords": ("rollout_id", "evaluation")}),
        ("custom_reward_post_process_path", "args samples", {}),
        ("custom_convert_samples_to_train_data_path", "args samples", {}),
        ("dynamic_sampling_filter_path", "args samples", {}),
        ("buffer_filter_path", "args rollout_id buffer num_samples", {}),
        ("rollout_sample_filter_path", "args groups", {}),
        ("rollout_all_samples_process_path", "args all_groups data_source", {}),
        ("rollout_data_postprocess_path", "args rollout_id rollout_data", {}),
        ("custom_rollout_log_function_path", "rollout_id args samples rollout_extra_metrics rollout_time", {}),
        ("custom_eval_rollout_log_function_path", "rollout_id args data extra_metrics", {}),
        ("custom_loss_function_path", "args batch logits sum_of_sample_mean", {}),
        ("custom_advantage_function_path", "args rollout_data", {}),
        ("custom_tis_function_path", "args", {"keywords": _TIS_KEYWORDS}),
        (
            "custom_pg_loss_reducer_function_path",
            "total_lengths response_lengths loss_masks calculate_per_token_loss",
            {},
        ),
        (
            "custom_model_provider_path",
            "",
            {"keywords": ("pre_process", "post_process"), "optional_keywords": ("vp_stage",)},
        ),
        ("custom_megatron_init_path", "args", {}),
        ("custom_megatron_before_log_prob_hook_path", "args model store_prefix", {}),
        (
            "custom_megatron_before_train_step_hook_path",
            "args rollout_id step_id model optimizer opt_param_scheduler",
            {},
        ),
        ("custom_update_weight_post_write_path", "args version_dir rollout_engines", {}),
    )
)
GENERATE = Hook(
    "custom_generate_function_path",
    ("args", "sample", "sampling_params"),
    optional_keywords=("evaluation",),
    is_async=True,
    default_names=("custom_generate", "generate"),
)
GENERATE_LIST = Hook(
    GENERATE.dest,
    ("args", "samples"),
    optional_keywords=("sampling_params", "evaluation"),
    is_async=True,
    default_names=GENERATE.default_names,
)
REWARD = Hook(
    "custom_rm_path",
    ("args", "sample"),
    default_names=("CustomRewardModel", "custom_rm", "reward_func", "compute_reward"),
)
REWARD_CLASS = Hook("custom_rm_path", ("prompts", "responses"))
_EITHER = {"rollout_sample_hook_path", "custom_rm_path"}  # plain or async


def check_hooks(values: dict[str, Any]) -> None:
    """Check every hook flag of the flat values; defaults of slime's own are known to be right.

    Raises:
        ConfigError: everything that is wrong with them.
    """
    problems = Problems()
    defaults = {f.name: default_of(f) for g in GROUPS.values() for f in fields(g)}
    for hook in HOOKS:
        given = values.get(hook.dest)
        for path in given if isinstance(given, list) else [given]:
            if path is not None and path != defaults.get(hook.dest):
                with problems.collected():
                    _check_function(hook, find(hook.flag, path, hook.default_names), path)
    for flag, path in _generate_paths(values):
        with problems.collected():
            _check_generate(flag, path)
    for flag, path in _reward_paths(values):
        with problems.collected():
            _check_reward(flag, path, values.get("rm_model_path"))
    if values["data_source_path"] != defaults["data_source_path"]:
        with problems.collected():
            _check_data_source(values["data_source_path"])
    if values.get("spec"):
        with problems.collected():
            _check_spec(values["spec"])
    problems.raise_if_any()


def _generate_paths(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if path := values.get("custom_generate_function_path"):
        yield GENERATE.flag, path
    for dataset in values.get("eval_datasets", ()):
        if dataset.custom_generate_function_path:
            yield (
                f"custom_generate_function_path of evaluation task {dataset.name}",
                dataset.custom_generate_function_path,
            )


def _reward_paths(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    own = values.get("custom_rm_path")
    if own:
        yield REWARD.flag, own
    for dataset in values.get("eval_datasets", ()):
        if dataset.custom_rm_path and dataset.custom_rm_path != own:
            yield f"custom_rm_path of evaluation task {dataset.name}", dataset.custom_rm_path


def _check_function(hook: Hook, found: Found, path: str, flag: str | None = None) -> None:
    node, flag = found.node, flag or hook.flag
    if node is None:
        return
    if isinstance(node, ast.ClassDef):
        raise ConfigError(f"{flag} {path}: {found.where} is a class; slime calls a function: {hook.call}")
    is_async = isinstance(node, ast.AsyncFunctionDef)
    if is_async and not hook.is_async and hook.dest not in _EITHER:
        raise ConfigError(f"{flag} {path}: {found.where} is `async def`, but is called directly; write {hook.call}")
    if hook.is_async and is_never_awaitable(node):
        raise ConfigError(f"{flag} {path}: {found.where} is a plain `def`, but is awaited; write {hook.call}")
    signature = signature_of(node)
    if signature is None:
        return
    keywords = [*hook.keywords, *(k for k in hook.optional_keywords if signature.takes_keyword(k))]
    keywords = [k for k in keywords if k not in signature.positional[: len(hook.positional)]]
    if problem := signature.problem_of_call(hook.positional, keywords):
        raise ConfigError(
            f"{flag} {path}: {found.where} has the parameters {signature} and {problem}; write {hook.call}"
        )


def _check_generate(flag: str, path: str) -> None:
    """The second parameter's name tells the list form from the per-sample form."""
    found = find(flag, path, GENERATE.default_names)
    signature = signature_of(found.node) if isinstance(found.node, Function) else None
    is_list_form = signature is not None and signature.positional[1:2] == ("samples",)
    _check_function(GENERATE_LIST if is_list_form else GENERATE, found, path, flag)


def _check_reward(flag: str, path: str, model_path: str | None) -> None:
    found = find(flag, path, REWARD.default_names)
    node = found.node
    if not isinstance(node, ast.ClassDef):
        _check_function(REWARD, found, path, flag)
        return
    method = method_of(node, "compute_reward")
    if method is None and not node.bases:
        raise ConfigError(
            f"{flag} {path}: the class {found.where} has no compute_reward; write "
            "def compute_reward(self, prompts, responses) -> list of numbers"
        )
    signature = signature_of(method, is_method=True) if method else None
    if signature and (problem := signature.problem_of_call(REWARD_CLASS.positional)):
        raise ConfigError(
            f"{flag} {path}: compute_reward of {found.where} has the parameters {signature} and {problem}; write "
            "def compute_reward(self, prompts, responses)"
        )
    init = _init_of(node)
    if init is not None and init.num_required > 0 and model_path is None:
        raise ConfigError(
            f"{flag} {path}: the class {found.where} is built with {', '.join(init.positional[: init.num_required])}; "
            "add --rm-model-path DIR"
        )


def _check_data_source(path: str) -> None:
    flag = "--data-source-path"
    found = find(flag, path, ("RolloutDataSourceWithBuffer", "RolloutDataSource"))
    node = found.node
    if node is None or isinstance(node, Function):
        return  # a function that builds the source is called like a class
    if method_of(node, "get_samples") is None and not node.bases:
        raise ConfigError(
            f"{flag} {path}: the class {found.where} has no get_samples; write def get_samples(self, num_samples)"
        )
    init = _init_of(node)
    if init is not None and init.num_required > 1:
        raise ConfigError(
            f"{flag} {path}: {found.where} is built with {', '.join(init.positional)}; slime passes `args` only: "
            "write def __init__(self, args)"
        )


def _init_of(node: ast.ClassDef) -> Signature | None:
    init = method_of(node, "__init__")
    return signature_of(init, is_method=True) if init else None


def _check_spec(words: list[str]) -> None:
    if len(words) != 2:
        raise ConfigError(
            f"--spec {' '.join(words)}: is {len(words)} word(s); type two, the module and the function: "
            "--spec slime_plugins.models.glm4 get_glm_spec"
        )
    find("--spec", ".".join(words))
