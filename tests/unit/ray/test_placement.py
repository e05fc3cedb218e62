"""Which devices trainers and engines get, as arithmetic on counts."""

from argparse import Namespace
from typing import Any

import pytest

from slime.ray.cluster import device_resource, devices_needed, placement_layout
from slime.ray.placement_group import device_order


def args(**given: Any) -> Namespace:
    defaults: dict[str, Any] = {
        "actor_num_nodes": 1, "actor_num_gpus_per_node": 4, "rollout_num_gpus": 2, "colocate": False,
        "debug_train_only": False, "debug_rollout_only": False, "rollout_external": False,
    }  # fmt: skip
    return Namespace(**(defaults | given))


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({}, (6, 4)),
        ({"actor_num_nodes": 2}, (10, 8)),
        ({"colocate": True}, (4, 0)),
        ({"colocate": True, "rollout_num_gpus": 6}, (6, 0)),
        ({"debug_train_only": True}, (4, 0)),
        ({"debug_rollout_only": True}, (2, 0)),
        ({"rollout_external": True}, (4, 4)),
        ({"rollout_num_gpus": 0}, (4, 4)),
    ],
)
def test_trainers_come_first_and_engines_share_or_follow(given: dict[str, Any], layout: tuple[int, int]) -> None:
    assert placement_layout(args(**given)) == layout
    assert devices_needed(args(**given)) == layout[0]


def test_a_device_is_one_unit_of_a_resource() -> None:
    assert device_resource(Namespace(device="cuda")) == "GPU"
    assert device_resource(Namespace(device="cpu")) == "cpu_device"


def test_ranks_fill_a_node_before_the_next_and_the_fullest_node_first() -> None:
    """Bundles 0 to 5 as Ray may spread them: four on node b, two on node a."""
    nodes = {0: "b", 1: "a", 2: "b", 3: "b", 4: "a", 5: "b"}
    assert device_order(nodes, [3, 1, 0, 2, 0, 1]) == (2, 5, 3, 0, 4, 1)
    assert device_order(nodes, [-1] * 6) == (0, 2, 3, 5, 1, 4)
