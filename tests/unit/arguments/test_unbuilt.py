"""What is not built is refused by name, and every flag that is not refused is read."""

import ast
import pathlib
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.arguments.build import finish
from slime.arguments.help_text import with_state
from slime.arguments.megatron_check import no_megatron_flag_is_ignored
from slime.arguments.parser import read_command_line, slime_flags, table_flags
from slime.config import ConfigError, Machine
from slime.config.eval_datasets import FALLBACKS
from slime.config.groups import GROUPS
from slime.config.unbuilt import UNBUILT
from tests.unit.arguments.wrong_command_lines import right_command_line

PACKAGE = pathlib.Path(__file__).parents[3] / "slime"
ARGS = {"args", "_args", "base_args"}
READ_BY_PLUG_INS_ALONE = {
    "max_turns", "rollout_buffer_url", "fetch_trajectory_retry_times", "min_batch_collection_ratio", "rollout_task_type"
}  # fmt: skip
WITHOUT_EFFECT_BY_DESIGN = {
    "check_weight_update_equal",  # the proof is always on
    "use_tensorboard",  # on by default
    "train_backend",  # one choice
}
FIELDS_OF_MEGATRON = {"clip_grad"}  # reaches the trainer through megatron_fields


def test_an_unbuilt_flag_ends_the_start_with_what_to_do_instead(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(right_command_line(files, "--streaming-data --num-data-workers 4"), capsys)
    assert "--streaming-data is not built yet" in message
    assert "--num-data-workers 4 is not built yet" in message


def test_of_a_flag_with_choices_only_those_that_cannot_be_are_refused(
    files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(right_command_line(files, "--router-policy power_of_two"), capsys)
    assert "--router-policy power_of_two is not built yet: the router wants two engines" in message
    assert parse_args(right_command_line(files, "--router-policy round_robin")).router_policy == "round_robin"


@pytest.mark.parametrize("flag", ["--sglang-admin-api-key", "--router-api-key"])
def test_a_key_is_not_shown(flag: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(right_command_line(files, f"{flag} hunter2"), capsys)
    assert flag in message
    assert "hunter2" not in message


def test_a_plan_knows_of_every_unbuilt_flag_that_it_was_given(files: dict[str, str]) -> None:
    """Only what stands in `plan.given` can be refused; the flags come from four tables."""
    line = read_command_line(right_command_line(files))
    line.given |= UNBUILT.keys()
    args = finish(line, loop="sync", machine=Machine(cores=8))
    assert UNBUILT.keys() - args.plan.given.keys() == set()


GPUS = Machine(cores=64, num_gpus=8, has_sglang=True)


@pytest.mark.parametrize(
    ("machine", "words", "message"),
    [
        (Machine(cores=8, num_gpus=2), "--device auto --actor-num-gpus-per-node 1 --rollout-num-gpus 1",
         "--rollout-engine embedded .the package sglang is not installed. is not built yet on GPUs"),
        (GPUS, "--device cuda --rollout-engine embedded --actor-num-gpus-per-node 1 --rollout-num-gpus 1",
         "--rollout-engine embedded .* --device cpu"),
        (GPUS, "--device cuda --actor-num-gpus-per-node 1 --rollout-num-gpus 1 --distributed-backend gloo", "use nccl"),
        (GPUS, "--device cuda --colocate --actor-num-gpus-per-node 1 --sglang-dtype float16",
         "--sglang-dtype float16 .* as they are trained"),
        (GPUS, "--device cuda --colocate --actor-num-gpus-per-node 2 --rollout-num-gpus-per-engine 2 "
         "--sglang-dp-size 2 --sglang-enable-dp-attention", "--sglang-enable-dp-attention is not built yet"),
        (GPUS, "--device cuda --colocate --actor-num-gpus-per-node 1 --sglang-quantization fp8",
         "--sglang-quantization fp8 .* leave it out"),
    ],
    ids=["no SGLang", "embedded on GPUs", "gloo on GPUs", "other weights", "another layout", "quantised weights"],
)  # fmt: skip
def test_what_the_devices_cannot_do_yet_is_refused(
    machine: Machine, words: str, message: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("slime.arguments.build.look_at_machine", lambda: machine)
    assert re.search(message, refusal(right_command_line(files, words), capsys))


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (GPUS, "--device cuda --actor-num-gpus-per-node 4 --rollout-num-gpus 4"),
        (GPUS, "--device cuda --colocate --actor-num-gpus-per-node 4 --debug-train-only"),
        (GPUS, "--device cuda --colocate --actor-num-gpus-per-node 1 --sglang-dtype bfloat16 --sglang-device cuda"),
        (GPUS, "--device cuda --debug-rollout-only --rollout-num-gpus 1 --sglang-quantization fp8"),
        (GPUS, "--device cpu --colocate --actor-num-gpus-per-node 2"),
        (Machine(cores=8), "--device cpu --actor-num-nodes 2"),
        (Machine(cores=8, joins_cluster=True), "--device cpu --actor-num-nodes 2"),
    ],
)
def test_what_they_can_do_is_not(
    machine: Machine, words: str, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slime.arguments.build.look_at_machine", lambda: machine)
    assert parse_args(right_command_line(files, words)).plan.device.value == words.split()[1]


def test_overrides_of_engines_that_get_weights_are_refused_like_flags(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A judge's weights are its own."""
    monkeypatch.setattr("slime.arguments.build.look_at_machine", lambda: GPUS)
    group = "{num_gpus: 2, overrides: {quantization: fp8}}"
    path = tmp_path / "engines.yaml"
    words = right_command_line(files, f"--device cuda --actor-num-gpus-per-node 2 --sglang-config {path}")
    path.write_text(f"sglang: [{{name: actor, server_groups: [{group}]}}]")
    assert "the override of actor, quantization: fp8, is not built yet" in refusal(words, capsys)
    path.write_text(
        f"sglang: [{{name: actor, server_groups: [{{num_gpus: 2}}]}},\n"
        f"         {{name: judge, model_path: /judge, server_groups: [{group}]}}]"
    )
    assert len(parse_args(words).engine_groups) == 2


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a start that is refused says."""
    with pytest.raises(SystemExit) as stop:
        parse_args(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_refused_name_is_a_flag_with_that_spelling() -> None:
    flags = [*slime_flags(), *(flag for flags in table_flags().values() for flag in flags)]
    spelt = {name for flag in flags if flag.dest in UNBUILT for name in flag.names}
    assert {"--" + dest.replace("_", "-") for dest in UNBUILT} <= spelt


@pytest.mark.parametrize(
    ("dest", "words"),
    [
        ("streaming_data", "Not built yet."),
        ("advantage_estimator", "Not built yet: ppo."),
        ("rollout_top_p", "Not built yet: anything but 1.0."),
        ("context_parallel_size", "Not built yet: anything but 1."),
        ("moe_router_topk", "Not built yet."),
        ("attention_backend", "Built: auto, flash, fused."),
        ("recompute_modules", "Built: core_attn, mlp, core_attn mlp."),
        ("swiglu", ""),
        ("lr", ""),
    ],
)
def test_the_help_says_what_is_not_built(dest: str, words: str) -> None:
    flag = next(f for f in [*slime_flags(), *table_flags()["megatron"]] if f.dest == dest)
    assert with_state("Text.", flag) == f"Text. {words}".strip()


def test_the_help_of_every_megatron_flag_agrees_with_what_is_refused() -> None:
    """A flag with a value that is not its default: refused if and only if the help says that it is not built."""
    for flag in table_flags()["megatron"]:
        if flag.dest in UNBUILT:
            continue
        value = {"switch_on": True, "switch_off": False, "on_or_off": not flag.default}.get(flag.kind, "something")
        given = Namespace(plan=Namespace(given={flag.dest: value}))
        says_so = with_state("", flag).strip(". ")
        if says_so.startswith("Built:") and flag.kind == "on_or_off":
            continue  # one of its two forms
        with pytest.raises(ConfigError) if says_so else nullcontext():
            no_megatron_flag_is_ignored(given)


def test_no_default_is_refused() -> None:
    refused = [flag.dest for flag in slime_flags() if flag.dest in UNBUILT and UNBUILT[flag.dest][0](flag.default)]
    assert refused == []


def test_every_other_flag_is_read_somewhere() -> None:
    """A flag that nothing reads would be accepted and do nothing."""
    read = set().union(*(dests_read_in(file) for file in PACKAGE.rglob("*.py")))
    evaluation = {dest for dests in FALLBACKS.values() for dest in dests}
    unread = {flag.dest for flag in slime_flags()} - read - evaluation - UNBUILT.keys()
    assert unread == READ_BY_PLUG_INS_ALONE | WITHOUT_EFFECT_BY_DESIGN | FIELDS_OF_MEGATRON


def dests_read_in(file: pathlib.Path) -> set[str]:
    """Names that a file reads from `args` or, where the configuration is resolved, from one of its groups."""
    name = str(file.relative_to(PACKAGE))
    if name.startswith(("config/groups", "config/rules", "config/unbuilt.py", "arguments/megatron_check.py")):
        return set()
    tree = ast.parse(file.read_text())
    read = set(_by_attribute(tree, ARGS))
    if name.startswith(("config/", "arguments/")):
        return read | set(_of_groups(tree)) | set(_keys(tree))
    return read | set(_by_name(tree))


def _by_attribute(tree: ast.AST, bases: set[str]) -> Iterator[str]:
    """x of `args.x`, `self.args.x` and so on, where it is read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _last_name(node.value) in bases:
            yield node.attr


def _of_groups(tree: ast.AST) -> Iterator[str]:
    """x of `config.group.x`, also after `group = config.group` or with a group as parameter."""
    aliases = set(GROUPS) | {"e", "a", "c", "w", "d", "given", "checkpoint", "sync"}
    yield from _by_attribute(tree, aliases)


def _keys(tree: ast.AST) -> Iterator[str]:
    """x of `values["x"]` and of names in a tuple or as an argument (`default_of("x")`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.ctx, ast.Load):
            yield str(node.slice.value)
        elif isinstance(node, ast.Call):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def _by_name(tree: ast.AST) -> Iterator[str]:
    """x of `getattr(anything, "x")` and `read(args, "x")`, and the strings over which a comprehension calls these."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _reads_by_name(node):
            yield from _strings(node)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) and any(
            isinstance(inner, ast.Call) and _reads_by_name(inner) for inner in ast.walk(node)
        ):
            yield from (text for generator in node.generators for text in _strings(generator.iter))


def _reads_by_name(call: ast.Call) -> bool:
    return len(call.args) > 1 and (_last_name(call.func) == "getattr" or _last_name(call.args[0]) in ARGS)


def _strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def _last_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None
