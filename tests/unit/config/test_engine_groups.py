"""What --sglang-config and --prefill-num-servers describe: groups on consecutive devices, or an error that says why."""

from typing import Any

import pytest

from slime.config import Config, ConfigError, Files, Machine, Plan, resolve
from slime.config.engine_groups import EngineGroup
from tests.unit.arguments.wrong_command_lines import TINY_QWEN3
from tests.unit.config.test_resolve import MINIMUM

CLUSTER = Machine(cores=64, has_sglang=True, joins_cluster=True, started="20260101-120000", working_dir="/project")


def plan(groups: Any = None, **values: Any) -> Plan:
    said = MINIMUM | {"device": "cuda", "actor_num_gpus_per_node": 2} | values
    if groups is not None:
        said["sglang_config"] = "engines.yaml"
    files = Files({"model": "huggingface"}, TINY_QWEN3, None, groups)
    return resolve(Config.from_values(said, given=frozenset(said), machine=CLUSTER, files=files))


def group(num_gpus: int, **more: Any) -> dict[str, Any]:
    return {"num_gpus": num_gpus, **more}


def model(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "actor", "server_groups": list(groups), **more}


def test_without_a_description_there_is_one_regular_group() -> None:
    (only,) = plan(rollout_num_gpus=4, rollout_num_gpus_per_engine=2).placement.engine_groups
    assert only == EngineGroup("default", None, True, "regular", 4, 2)
    assert only.num_engines == 2


def test_prefill_servers_take_the_first_devices_and_the_rest_decodes() -> None:
    p = plan(rollout_num_gpus=8, rollout_num_gpus_per_engine=2, prefill_num_servers=1)
    prefill, decode = p.placement.engine_groups
    assert (prefill.worker_type, prefill.num_engines) == ("prefill", 1)
    assert (decode.worker_type, decode.num_engines) == ("decode", 3)
    assert p.placement.num_engines == 4


def test_a_file_describes_models_groups_and_their_settings() -> None:
    groups = {
        "sglang": [
            model(group(4, overrides={"mem_fraction_static": 0.8}), num_gpus_per_engine=2),
            {
                "name": "judge",
                "model_path": "/models/judge",
                "engine_groups": [group(1), group(2, worker_type="placeholder")],
            },
        ]
    }
    p = plan(groups)
    actor, judge, nothing = p.placement.engine_groups
    assert actor == EngineGroup("actor", None, True, "regular", 4, 2, {"mem_fraction_static": 0.8})
    assert judge == EngineGroup("judge", "/models/judge", False, "regular", 1, 1)
    assert nothing.num_engines == 0
    assert (p.placement.rollout_num_gpus, p.placement.num_engines) == (7, 3)
    assert [f"{process.name} {process.count}" for process in p.processes if "engines" in process.name] == [
        "engines (sglang) of actor 2",
        "engines (sglang) of judge 1",
        "engines (sglang, placeholder) of judge 0",
    ]
    assert next(process.count for process in p.processes if process.name == "router") == 2


def test_the_trained_model_is_known_by_its_path() -> None:
    groups = {
        "sglang": [model(group(1, overrides={"model_path": "model"})), model(group(1), name="x", model_path="/x")]
    }
    assert [g.updates_weights for g in plan(groups).placement.engine_groups] == [True, False]


@pytest.mark.parametrize(
    ("groups", "values", "complaint"),
    [
        ([], {}, "no list `sglang`"),
        ({"sglang": [{"server_groups": [group(1)]}]}, {}, "has no name"),
        ({"sglang": [{"name": "actor"}]}, {}, "has no list server_groups"),
        ({"sglang": [model(group(1), weights=1)]}, {}, "a model has weights"),
        ({"sglang": [model(group(1, gpus=1))]}, {}, "a group of actor has gpus"),
        ({"sglang": [model(group(1, worker_type="encoder"))]}, {}, "only text models"),
        ({"sglang": [model(group(3, num_gpus_per_engine=2))]}, {}, "num_gpus 3 for engines of 2"),
        ({"sglang": [model(group(0))]}, {}, "num_gpus 0"),
        ({"sglang": [model(group(1, overrides={"tp_size": 2}))]}, {}, "overrides tp_size, which the run decides"),
        (
            {"sglang": [model(group(1, overrides={"disaggregation_mode": "prefill"}))]},
            {},
            "overrides disaggregation_mode",
        ),
        (
            {"sglang": [model(group(1, overrides={"mem_fraction_static": 80}))]},
            {},
            "mem_fraction_static 80; give",
        ),
        ({"sglang": [model(group(True))]}, {}, "num_gpus True"),
        (
            {"sglang": [model(group(1, overrides={"random_seed": 2}))]},
            {},
            "overrides random_seed, which the run decides",
        ),
        (
            {"sglang": [model(group(2))]},
            {"rollout_num_gpus": 3},
            "need 2 devices together, but --rollout-num-gpus is 3",
        ),
        ({"sglang": [model(group(2, worker_type="prefill"))]}, {}, "only prefill engines"),
        ({"sglang": [model(group(1), update_weights=False)]}, {}, "no group has update_weights"),
        (
            {"sglang": [model(group(2, num_gpus_per_engine=2), group(1))]},
            {},
            "1 and 2 devices; what proves that the weights arrived",
        ),
        ({"sglang": [model(group(1)), model(group(1), model_path="/x")]}, {}, "actor has the paths"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_description_that_cannot_be_is_refused(groups: Any, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(groups, **values)
    assert any(complaint in message and "--sglang-config engines.yaml" in message for message in error.value.messages)


@pytest.mark.parametrize(("servers", "gpus"), [(4, 8), (0, 8)])
def test_prefill_servers_that_leave_nothing_to_decode_are_refused(servers: int, gpus: int) -> None:
    with pytest.raises(ConfigError, match="--prefill-num-servers"):
        plan(rollout_num_gpus=gpus, rollout_num_gpus_per_engine=2, prefill_num_servers=servers)


def test_an_engine_fills_its_nodes() -> None:
    with pytest.raises(ConfigError, match="an engine of 12 devices does not fill nodes of --num-gpus-per-node 8"):
        plan(rollout_num_gpus=12, rollout_num_gpus_per_engine=12)
    sixteen = plan(rollout_num_gpus=16, rollout_num_gpus_per_engine=16, actor_num_gpus_per_node=8)
    assert sixteen.placement.num_engines == 1


def test_an_engine_does_not_begin_in_the_middle_of_a_node() -> None:
    """It would be told of devices that the node does not have. With --colocate engines begin at the first device."""
    sixteen = {"rollout_num_gpus": 16, "rollout_num_gpus_per_engine": 16, "actor_num_gpus_per_node": 4}
    with pytest.raises(ConfigError, match="engine 0 of 16 devices begins at device 4 of a node"):
        plan(**sixteen)
    with pytest.raises(ConfigError, match="engine 1 of 4 devices begins at device 6 .* nodes of --num-gpus-per-node 8"):
        plan(rollout_num_gpus=8, rollout_num_gpus_per_engine=4, actor_num_gpus_per_node=2)
    for accepted in (
        sixteen | {"colocate": True, "actor_num_nodes": 2, "actor_num_gpus_per_node": 8},
        {"rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4, "actor_num_gpus_per_node": 4},
        {"rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 2, "actor_num_gpus_per_node": 2},
    ):
        assert plan(**accepted).placement.rollout_num_gpus == accepted["rollout_num_gpus"]


def test_a_placeholder_moves_the_engine_behind_it_to_the_next_node() -> None:
    free = {"worker_type": "placeholder", "num_gpus": 4, "num_gpus_per_engine": 4}
    engine = {"num_gpus": 8, "num_gpus_per_engine": 8}
    with pytest.raises(ConfigError, match="engine 0 of 8 devices begins at device 4"):
        plan({"sglang": [model(engine)]}, actor_num_gpus_per_node=4)
    assert plan({"sglang": [model(free, engine)]}, actor_num_gpus_per_node=4).placement.num_engines == 1


def test_the_embedded_engine_is_of_one_kind() -> None:
    with pytest.raises(ConfigError, match="describes SGLang servers"):
        plan(rollout_num_gpus=4, prefill_num_servers=1, rollout_engine="embedded", device="cpu")


def test_external_engines_share_no_devices() -> None:
    with pytest.raises(ConfigError, match="run where they were started"):
        plan(colocate=True, rollout_external_engine_addrs=["h:1"])
    assert plan(rollout_external_engine_addrs=["h:1"]).placement.engine_groups == ()
