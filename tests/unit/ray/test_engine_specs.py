"""Where engines compute and how each is started, from the plan to the command line of every node."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.backends.sglang.launch import server_command
from slime.config import ConfigError
from slime.config.engine_groups import EngineGroup
from slime.ray.engine_specs import check_nodes, engine_specs


def args(*groups: EngineGroup, **values: object) -> Namespace:
    common = dict(
        engine_groups=groups, actor_num_nodes=1, actor_num_gpus_per_node=4, num_gpus_per_node=8, colocate=False,
        offload_rollout=False, bf16=True, fp16=False, device="cuda", hf_checkpoint="/models/m", rollout_threads=1,
        run_dir="/runs/r", seed=10,
    )  # fmt: skip
    return Namespace(**(common | values))


def specs(given: Namespace, num_devices: int) -> list[list[EngineSpec]]:
    return engine_specs(given, [device % 8 for device in range(num_devices)], Path("/w"))


def regular(num_gpus: int, per_engine: int, **more: object) -> EngineGroup:
    return replace(EngineGroup("default", None, True, "regular", num_gpus, per_engine), **more)  # type: ignore[arg-type]


def words(given: Namespace, spec: EngineSpec) -> tuple[str, dict[str, str]]:
    argv, env = server_command(given, spec)
    return " ".join(argv) + " ", env


def test_engines_take_consecutive_devices() -> None:
    given = args(regular(8, 2))
    engines = specs(given, 8)
    assert [spec.device_ids for (spec,) in engines] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [spec.first_device for (spec,) in engines] == [0, 2, 4, 6]
    assert [(spec.index, spec.seed) for (spec,) in engines] == [(0, 10), (1, 11), (2, 12), (3, 13)]
    command, env = words(given, engines[3][0])
    assert "--tp-size 2 " in command and env["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert "--nnodes" not in command


def test_an_engine_of_two_nodes_is_two_servers_that_meet() -> None:
    given = args(regular(32, 16))
    first, second = specs(given, 32)
    assert [part.name for part in second] == ["engine 1", "engine 1 on its node 1"]
    assert [part.log_path.name for part in second] == ["engine_1.log", "engine_1_node_1.log"]
    meeting = [replace(part, dist_address="10.0.0.1:20000") for part in second]
    for rank, part in enumerate(meeting):
        command, env = words(given, part)
        assert f"--nnodes 2 --node-rank {rank} --dist-init-addr 10.0.0.1:20000 " in command
        assert "--tp-size 16 " in command
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert first[0].first_device == 0 and second[0].first_device == 16


def test_prefill_and_decode_engines_are_told_their_part() -> None:
    given = args(regular(2, 2, worker_type="prefill"), regular(4, 2, worker_type="decode"))
    (prefill,), (decode,), _ = specs(given, 6)
    command, _ = words(given, replace(prefill, bootstrap_port=9001))
    assert "--disaggregation-mode prefill --disaggregation-bootstrap-port 9001 " in command
    command, _ = words(given, decode)
    assert "--disaggregation-mode decode " in command and "bootstrap-port" not in command


def test_a_group_has_settings_and_a_model_of_its_own_and_a_placeholder_keeps_devices_free() -> None:
    judge = EngineGroup(
        "judge", "/models/j", False, "regular", 1, 1, {"context_length": 512, "mem_fraction_static": 0.5}
    )
    given = args(replace(regular(2, 2), worker_type="placeholder"), judge, sglang_context_length=4096)
    ((spec,),) = specs(given, 3)
    assert (spec.device_ids, spec.model, spec.updates_weights) == ((2,), "judge", False)
    command, _ = words(given, spec)
    assert "--model-path /models/j " in command
    assert "--context-length 512 " in command and "--mem-fraction-static 0.5 " in command


def test_engines_beside_trainers_give_their_memory_back_and_others_keep_it() -> None:
    given = args(regular(8, 2), colocate=True, offload_rollout=True)
    engines = specs(given, 8)
    assert [spec.gives_memory_back for (spec,) in engines] == [True, True, False, False]
    assert ["--enable-memory-saver " in words(given, spec)[0] for (spec,) in engines] == [True, True, False, False]


def test_a_model_that_no_sync_fills_again_keeps_a_copy_of_its_weights() -> None:
    given = args(regular(4, 4, updates_weights=False), colocate=True, offload_rollout=True)
    ((spec,),) = specs(given, 4)
    assert "--enable-weights-cpu-backup " in words(given, spec)[0]


def test_keys_of_an_engine_are_those_of_the_run() -> None:
    given = args(regular(1, 1), sglang_api_key="k", sglang_admin_api_key="a")
    ((spec,),) = specs(given, 1)
    _, env = words(given, spec)
    assert (env["SLIME_API_KEY"], env["SLIME_ADMIN_API_KEY"]) == ("k", "a")


def test_an_engine_whose_devices_are_on_two_nodes_is_refused_before_it_starts() -> None:
    """Nodes of 4 where 8 were said: both halves of the first engine would be told of devices of the other node."""
    given = args(regular(8, 8))
    with pytest.raises(ConfigError, match=r"engine 0 has to lie on 8 devices of one node, .* 4 and 4 on 2 nodes"):
        check_nodes(specs(given, 8), ["a"] * 4 + ["b"] * 4)
    check_nodes(specs(given, 8), ["a"] * 8)
    given = args(regular(16, 16))
    check_nodes(specs(given, 16), ["a"] * 8 + ["b"] * 8)
    with pytest.raises(ConfigError, match=r"engine 0 on its node 1 has to lie on 8 .* 7 and 1 on 2 nodes"):
        check_nodes(specs(given, 16), ["a"] * 8 + ["b"] * 7 + ["c"])
