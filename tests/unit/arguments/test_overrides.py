"""Roles of --megatron-config-path take their own values."""

from argparse import Namespace
from pathlib import Path

import pytest

from slime.arguments import build_args, megatron_fields, parse_megatron_role_args
from slime.config import ConfigError, Machine
from tests.unit.arguments.wrong_command_lines import right_command_line

ROLES = """
megatron:
  - {name: default, role: actor, overrides: {lr: "1e-5", clip_grad: 0.5, num_nodes: 7}}
  - {name: critic, role: critic, args: {lr: 2e-5, load: critic_model, kl_coef: 0.1}}
"""


@pytest.fixture
def roles(tmp_path: Path) -> str:
    path = tmp_path / "roles.yaml"
    path.write_text(ROLES)
    return str(path)


@pytest.fixture
def args(files: dict[str, str], laptop: Machine) -> Namespace:
    return build_args(right_command_line(files, "--advantage-estimator ppo"), machine=laptop)


def test_a_role_changes_a_copy_and_text_becomes_a_number(args: Namespace, roles: str) -> None:
    actor = parse_megatron_role_args(args, roles, "actor")
    assert (actor.lr, actor.clip_grad) == (1e-5, 0.5)
    assert (args.lr, args.clip_grad) == (1e-6, 1.0)
    assert actor.actor_num_nodes == args.actor_num_nodes
    assert not hasattr(actor, "num_nodes")


def test_a_role_reaches_megatrons_configs(args: Namespace, roles: str) -> None:
    assert megatron_fields(args)["clip_grad"] == 1.0
    fields = megatron_fields(parse_megatron_role_args(args, roles, "actor"))
    assert (fields["lr"], fields["clip_grad"]) == (1e-5, 0.5)


def test_a_critic_has_no_kl_and_a_head_of_its_own_unless_told(args: Namespace, roles: str) -> None:
    critic = parse_megatron_role_args(args, roles, "critic")
    assert (critic.lr, critic.load, critic.kl_coef) == (2e-5, "critic_model", 0.1)
    assert critic.untie_embeddings_and_output_weights
    assert not critic.disable_param_buffers_cpu_backup
    assert parse_megatron_role_args(args, None, "critic").kl_coef == 0.0


def test_a_role_that_is_not_named_inherits(args: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("megatron: [{role: critic, overrides: {lr: 1e-5}}]")
    assert parse_megatron_role_args(args, str(path), "actor").lr == args.lr


def test_a_name_that_is_no_flag_is_set_with_a_note(
    args: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("megatron: [{role: actor, overrides: {weight_decai: 0.1}}]")
    assert parse_megatron_role_args(args, str(path), "actor").weight_decai == 0.1
    assert "weight_decai of actor is not a flag. Did you mean weight_decay" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("actor: {}", "has no list `megatron`"),
        ("megatron: [{role: judge}]", "'judge' is not a role"),
        ("megatron: [{role: actor}, {role: actor}]", "two of them for actor"),
        ("megatron: [{role: actor, overrides: [lr]}]", "are no mapping"),
        ("megatron: [", "is not YAML"),
    ],
)
def test_another_form_is_refused_with_an_example(text: str, message: str, args: Namespace, tmp_path: Path) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_megatron_role_args(args, str(path), "actor")
