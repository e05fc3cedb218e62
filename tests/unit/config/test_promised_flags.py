"""Every flag that launch scripts use exists with the promised type and default."""

import ast

import pytest

from slime.arguments.flag_tables import table
from slime.arguments.parser import slime_flags, spellings, table_flags
from slime.config.flags import Flag
from tests.unit.config.promised_flags import CHANGED, FLAGS, MEGATRON

LINES = [line.split(maxsplit=2) for line in FLAGS.strip().splitlines()]
SET_BY_SLIME = """model_path config trust_remote_code random_seed enable_memory_saver tp_size port nnodes node_rank
dist_init_addr gpu_id_step base_gpu_id nccl_port skip_server_warmup enable_return_routed_experts"""
OWN = {name: flag for flag in slime_flags() for name in flag.names}


@pytest.mark.parametrize(("name", "kind", "default"), LINES, ids=lambda value: value)
def test_a_flag_has_its_type_and_default(name: str, kind: str, default: str) -> None:
    flag = OWN[name]
    assert _as_promised(flag) == kind
    assert flag.default == ast.literal_eval(default)
    off = kind.removeprefix("off:")
    assert flag.dest == (off if off != kind else name.removeprefix("--").replace("-", "_"))


def test_the_other_flags_of_slimes_own_are_these() -> None:
    assert set(OWN) - {name for name, _, _ in LINES} == {
        "--allow-pickle-checkpoints",
        "--liveness-timeout",
        "--pause-generation-mode",
        "--profile-ranks",
        "--profile-step-end",
        "--profile-step-start",
        "--share-group-prompts",
        "--stale-samples",
        "--trust-remote-code",
        "--use-pytorch-profiler",
    }


@pytest.mark.parametrize("line", MEGATRON.strip().splitlines())
def test_a_flag_of_megatron_sets_its_attribute(line: str) -> None:
    name, dest = line.split()
    flags = [flag for flag in table("megatron") if name in spellings([flag])]
    assert [flag.dest for flag in flags] == [dest]


def test_the_router_starts_with_slimes_defaults() -> None:
    defaults = {flag.dest: flag.default for flag in table("router")}
    assert {dest: defaults[dest] for dest in CHANGED} == CHANGED


def test_sessions_may_be_kept_together_by_the_router() -> None:
    (policy,) = [flag for flag in table("router") if flag.dest == "router_policy"]
    assert policy.choices is not None
    assert {"cache_aware", "consistent_hashing"} <= set(policy.choices)


@pytest.mark.parametrize("dest", SET_BY_SLIME.split())
def test_what_slime_sets_on_an_engine_is_no_flag(dest: str) -> None:
    assert f"sglang_{dest}" not in {flag.dest for flag in table_flags()["sglang"]}


def test_no_spelling_means_two_things() -> None:
    flags = [*slime_flags(), *(flag for flags in table_flags().values() for flag in flags)]
    names = [name for flag in flags for name in spellings([flag])]
    assert sorted(names) == sorted(set(names))


def test_every_field_of_megatrons_configs_is_set_by_a_flag() -> None:
    """Those of a whole recipe, as an example of each kind of field."""
    fields = {field for flag in table("megatron") for field in flag.fields}
    assert {
        "layernorm_epsilon", "add_bias_linear", "num_moe_experts", "bucket_size", "adam_eps", "overlap_grad_reduce",
        "fp8_param_gather", "q_lora_rank", "moe_layer_freq", "attention_backend", "exp_avg_dtype", "lr", "clip_grad",
    } <= fields  # fmt: skip


def _as_promised(flag: Flag) -> str:
    """The flag's type in the words of the table."""
    match flag.kind:
        case "switch_on":
            return "switch"
        case "switch_off":
            return f"off:{flag.dest}"
        case "on_or_off":
            return "on|off"
        case "json":
            return "json"
    word = "|".join(map(str, flag.choices)) if flag.choices else flag.value_type
    return word + ("+" if flag.nargs == "+" else "") + ("*" if flag.kind in ("append", "extend") else "")
