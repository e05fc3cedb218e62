"""Joining a Ray cluster: what its processes are told, and addresses at which there is none."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from slime.config import ConfigError
from slime.ray import cluster
from slime.utils.processes import free_port


def test_actors_of_a_cluster_find_slime_and_its_settings(repository: Path) -> None:
    """They inherit nothing of the driver's environment. Ray shows what they are told, so the key is no part of it."""
    told = cluster.environment_of_actors(
        {"PYTHONPATH": "/plug-ins", "SLIME_RUN_TOKEN": "abc", "SLIME_SGLANG_PYTHON": "/sglang/bin/python",
         "SLIME_API_KEY": "secret", "SLIME_HOST_IP": "10.0.0.1", "SPT_NOENV": "1", "HOME": "/root"}
    )  # fmt: skip
    assert told == {
        "PYTHONPATH": f"{repository}:/plug-ins", "SLIME_RUN_TOKEN": "abc", "SLIME_SGLANG_PYTHON": "/sglang/bin/python",
        "SPT_NOENV": "1",
    }  # fmt: skip


def test_what_a_ray_job_was_given_is_left_to_it() -> None:
    """Ray refuses a variable that both the job and the driver set."""
    job = json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": "/repository"}}})
    told = cluster.environment_of_actors({"RAY_JOB_CONFIG_JSON_ENV_VAR": job, "SLIME_RUN_TOKEN": "abc"})
    assert told == {"SLIME_RUN_TOKEN": "abc"}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "ray job submit .* RAY_ADDRESS=HEAD:6379"),
        (f"127.0.0.1:{free_port()}", "No Ray cluster answers at RAY_ADDRESS=127.0.0.1:.*Unset RAY_ADDRESS"),
    ],
    ids=["a dashboard", "nobody"],
)
def test_an_address_without_a_cluster_is_refused_at_once(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=message):
        cluster.start(Namespace(device="cpu"))


def test_the_key_reaches_actors_of_a_cluster_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **given: told.update(given))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("SLIME_API_KEY", "secret")
    args = Namespace(
        device="cuda", sglang_api_key=None, actor_num_nodes=1, actor_num_gpus_per_node=1, rollout_num_gpus=1,
        colocate=True, debug_train_only=False, debug_rollout_only=False,
    )  # fmt: skip
    cluster.start(args)
    assert args.sglang_api_key == "secret"
    assert "secret" not in str(told)
