"""From flat values to finished `args`: files are looked at, rules are checked, the plan is made and applied."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Literal

from slime.arguments import data_check
from slime.arguments.flag_tables import table
from slime.arguments.hooks import check_hooks
from slime.arguments.overrides import read_custom_config, read_engine_groups, read_role_entries
from slime.arguments.parser import CommandLine, CustomArguments, read_command_line, slime_flags, table_flags
from slime.config import Config, Plan, resolve
from slime.config.errors import Problems
from slime.config.eval_datasets import EvalDatasetConfig, eval_datasets_of
from slime.config.files import (
    Files,
    checkpoint_kinds,
    has_chat_template,
    has_tokenizer,
    has_weights,
    read_hf_config,
)
from slime.config.groups import DataConfig
from slime.config.keys import guessed_keys
from slime.config.machine import Machine, look_at_machine
from slime.config.paths import own_checkpoints

Loop = Literal["sync", "async"]


def build_args(
    argv: Sequence[str],
    add_custom_arguments: CustomArguments | None = None,
    *,
    loop: Loop = "sync",
    machine: Machine | None = None,
) -> Namespace:
    """Finished `args` of a command line.

    Args:
        argv: the words after the program's name.
        add_custom_arguments: adds a plug-in's own flags to the parser.
        loop: which loop will run, train.py's or train_async.py's.
        machine: facts about the machine; looked up when not given.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    line = read_command_line(argv, add_custom_arguments)
    if not line.is_read:
        line.problems.raise_if_any()
    return finish(line, loop=loop, machine=machine or look_at_machine())


def finish(line: CommandLine, *, loop: Loop, machine: Machine) -> Namespace:
    """Everything after parsing; see `build_args`."""
    values, problems = line.values, line.problems
    given = set(line.given)
    if values["custom_config_path"]:
        with problems.collected():
            flags = [*slime_flags(), *(flag for flags in table_flags().values() for flag in flags)]
            entries = read_custom_config(values["custom_config_path"], values, flags)
            values |= entries
            given |= entries.keys() & values.keys()
    rows = _first_rows("--prompt-data", values["prompt_data"], problems)
    datasets, eval_rows = _eval_datasets(values, given, rows, problems)
    config = _config(values, given, rows, datasets, problems, loop=loop, machine=machine)
    plan: Plan | None = None
    with problems.collected():
        plan = resolve(config)
    with problems.collected():
        check_hooks(values | {"eval_datasets": datasets})
    if values["megatron_config_path"]:
        with problems.collected():
            read_role_entries(values["megatron_config_path"])
    _check_data(config, values, rows, eval_rows, problems)
    _check_model_folder(config, problems)
    problems.raise_if_any()
    assert plan is not None
    return _finished(values, config, plan)


def _first_rows(flag: str, path: str | None, problems: Problems) -> list[data_check.Row]:
    if path is None:
        return []
    with problems.collected():
        return data_check.read_first_rows(flag, path)
    return []


def _eval_datasets(
    values: dict[str, Any], given: set[str], rows: list[data_check.Row], problems: Problems
) -> tuple[list[EvalDatasetConfig], list[list[data_check.Row]]]:
    """The evaluation's data sets, with the keys that their own first rows suggest."""
    datasets: list[EvalDatasetConfig] = []
    keys = _guessed(values, given, rows)
    with problems.collected():
        datasets = eval_datasets_of(Namespace(**(values | keys)))
    all_rows = []
    for dataset in datasets:
        first = _first_rows(f"evaluation task {dataset.name}", dataset.path, problems)
        row = first[0].values if first else {}
        if dataset.input_key not in row and not {"eval_input_key", "input_key"} & given and "prompt" in row:
            dataset.input_key = "prompt"
        if dataset.label_key is None and "label" in row:
            dataset.label_key = "label"
        all_rows.append(first)
    return datasets, all_rows


def _guessed(values: dict[str, Any], given: set[str], rows: list[data_check.Row]) -> dict[str, str]:
    data = DataConfig(input_key=values["input_key"], label_key=values["label_key"])
    return guessed_keys(data, given, rows[0].values if rows else None)


def _config(
    values: dict[str, Any],
    given: set[str],
    rows: list[data_check.Row],
    datasets: list[EvalDatasetConfig],
    problems: Problems,
    *,
    loop: Loop,
    machine: Machine,
) -> Config:
    """The typed configuration with every fact about files in it."""
    tables = table_flags()
    own = slime_flags()
    hf_config = None
    if values["hf_checkpoint"] is not None:
        with problems.collected():
            hf_config = read_hf_config(values["hf_checkpoint"])
    facts: dict[str, Any] = {
        "megatron": {f.dest: values[f.dest] for f in (*tables["megatron"], *own)},
        "sglang": {f.dest: values[f.dest] for f in tables["sglang"]},
        "router": {f.dest: values[f.dest] for f in tables["router"]},
        "given": frozenset(given),
        "loop": loop,
        "machine": machine,
        "eval_datasets": tuple(datasets),
    }
    config = Config.from_values(values, **facts)
    own_folder: str | None = None
    with problems.collected():
        own_folder = own_checkpoints(config)
    paths = [values[d] for d in ("load", "save", "ref_load", "opd_teacher_load", "hf_checkpoint")] + [own_folder]
    engines = None
    if values["sglang_config"]:
        with problems.collected():
            engines = read_engine_groups(values["sglang_config"])
    files = Files(checkpoint_kinds(paths), hf_config, rows[0].values if rows else None, engines)
    return Config.from_values(values, **facts, files=files)


def _check_data(
    config: Config,
    values: dict[str, Any],
    rows: list[data_check.Row],
    eval_rows: list[list[data_check.Row]],
    problems: Problems,
) -> None:
    keys = _guessed(values, set(config.given), rows)
    reward = (config.reward.rm_type or "").strip().removeprefix("boxed_")
    is_graded = config.reward.custom_rm_path is None and not config.skips_engines
    own_generate = config.rollout.custom_generate_function_path is not None or not config.uses_default_rollout
    common: dict[str, Any] = {"metadata_key": values["metadata_key"], "multimodal_keys": values["multimodal_keys"]}
    with problems.collected():
        data_check.check_rows(
            rows,
            data_check.Expected(
                flag="--prompt-data",
                input_key=keys.get("input_key", values["input_key"]),
                label_key=keys.get("label_key", values["label_key"]),
                tool_key=values["tool_key"],
                needs_label=reward if is_graded and reward in data_check.NEEDS_LABEL else None,
                renders_chats=values["apply_chat_template"] or own_generate or values["multimodal_keys"] is not None,
                **common,
            ),
        )
    for dataset, first in zip(config.eval_datasets, eval_rows, strict=True):
        with problems.collected():
            data_check.check_rows(
                first,
                data_check.Expected(
                    flag=f"evaluation task {dataset.name}",
                    input_key=dataset.input_key,
                    label_key=dataset.label_key,
                    tool_key=dataset.tool_key,
                    renders_chats=bool(dataset.apply_chat_template) or own_generate,
                    **common,
                ),
            )


def _check_model_folder(config: Config, problems: Problems) -> None:
    """Tokenizer, weights and chat template are in the model's folder, as far as the run needs them."""
    folder = config.rollout.hf_checkpoint
    if folder is None or config.files.hf_config is None:
        return
    if not has_tokenizer(folder):
        problems.add(f"--hf-checkpoint {folder}: holds no tokenizer (tokenizer.json); download the whole model")
    elif config.data.apply_chat_template and not has_chat_template(folder):
        problems.add(
            f"--apply-chat-template: the tokenizer in {folder} has no chat template; drop the flag, or use the "
            "instruct version of the model"
        )
    needs_weights = not (config.debug.debug_train_only and config.checkpoint.load)
    if needs_weights and not has_weights(folder) and not config.is_external:
        problems.add(f"--hf-checkpoint {folder}: holds no weights (*.safetensors); download the whole model")


def _finished(values: dict[str, Any], config: Config, plan: Plan) -> Namespace:
    """Flat attributes: the command line's, overruled by the plan's, Megatron's under both of their names."""
    merged = values | dict(plan.updates)
    merged.pop("offload")
    if config.skips_engines:
        merged = {k: v for k, v in merged.items() if not k.startswith(("sglang_", "router_"))}
    known = {f.dest for f in slime_flags()}
    decided = config.given | plan.updates.keys() | known  # slime's defaults hold over Megatron's
    field_dests: dict[str, str] = {}
    for flag in table("megatron"):
        for field in flag.fields:
            if field not in known:
                merged[field] = merged[flag.dest]
            if flag.dest in decided and merged[flag.dest] is not None:
                field_dests[field] = flag.dest
    args = Namespace(**merged)
    args.megatron_field_dests = field_dests
    args.plan = plan
    return args


def validate(args: Namespace, *, loop: Loop = "sync") -> None:
    """Check and finish an already parsed namespace, in place. What differs from its default counts as given.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    flags = [*slime_flags(), *(flag for flags in table_flags().values() for flag in flags)]
    defaults = {flag.dest: flag.default for flag in reversed(flags)}
    values = defaults | vars(args)
    given = {dest for dest, default in defaults.items() if values[dest] != default}
    finished = finish(CommandLine(values, given), loop=loop, machine=look_at_machine())
    if hasattr(args, "offload"):
        del args.offload
    vars(args).update(vars(finished))
