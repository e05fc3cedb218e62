"""Joining a Ray cluster: what its processes are told, and addresses at which there is none."""

import json
import os
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
         "SLIME_API_KEY": "secret", "SLIME_ADMIN_API_KEY": "admins", "SLIME_HOST_IP": "10.0.0.1", "SPT_NOENV": "1",
         "HOME": "/root"}
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


def joined(monkeypatch: pytest.MonkeyPatch, *, num_nodes: int, device: str = "cuda", **given: object) -> Namespace:
    """The arguments after a cluster of so many nodes was joined; what Ray was told is in `told`."""
    told: dict[str, object] = {}
    monkeypatch.setattr(cluster.ray, "init", lambda **given: told.update(given))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(cluster.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    nodes = [{"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"cpu_device": 1.0}}] * num_nodes
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [*nodes, {"Alive": False}])
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    args = Namespace(
        device=device, sglang_api_key=None, actor_num_nodes=1, actor_num_gpus_per_node=1, rollout_num_gpus=1,
        colocate=True, debug_train_only=False, debug_rollout_only=False, rollout_engine="sglang", told=told, **given,
    )  # fmt: skip
    cluster.start(args)
    return args


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a test that has put some there."""
    for name in ("SLIME_API_KEY", "SLIME_ADMIN_API_KEY"):
        monkeypatch.setenv(name, "")


def test_keys_reach_actors_of_a_cluster_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray shows environments, not arguments."""
    monkeypatch.setenv("SLIME_API_KEY", "secret")
    monkeypatch.setenv("SLIME_ADMIN_API_KEY", "admins")
    args = joined(monkeypatch, num_nodes=2)
    assert (args.sglang_api_key, args.sglang_admin_api_key) == ("secret", "admins")
    assert "secret" not in str(args.told) and "admins" not in str(args.told)
    assert cluster.own_host(args) == "10.0.0.1"


def test_without_a_key_servers_of_a_cluster_of_one_node_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    args = joined(monkeypatch, num_nodes=1)
    assert args.sglang_api_key is None and cluster.own_host(args) == "127.0.0.1"


def test_with_a_key_servers_of_one_node_can_be_reached_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIME_API_KEY", "secret")
    assert cluster.own_host(joined(monkeypatch, num_nodes=1)) == "10.0.0.1"


@pytest.mark.parametrize(
    ("num_nodes", "given"), [(2, {}), (1, {"sglang_router_ip": "10.0.0.9"})], ids=["two nodes", "a router elsewhere"]
)
def test_servers_that_others_reach_ask_for_a_key_of_the_runs_own(
    num_nodes: int, given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {joined(monkeypatch, num_nodes=num_nodes, **given).sglang_api_key}
    assert os.environ["SLIME_API_KEY"] in keys, "the driver's own requests carry it"
    monkeypatch.setenv("SLIME_API_KEY", "")
    args = joined(monkeypatch, num_nodes=num_nodes, **given)
    keys.add(args.sglang_api_key)
    assert len(keys) == 2 and min(len(str(key)) for key in keys) >= 32
    assert cluster.own_host(args) == "10.0.0.1" and args.sglang_api_key not in str(args.told)


def test_a_run_without_gpus_is_on_loopback_whatever_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    args = joined(monkeypatch, num_nodes=2, device="cpu")
    assert args.sglang_api_key is None and cluster.own_host(args) == "127.0.0.1"
