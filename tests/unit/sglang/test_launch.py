"""The command line of an SGLang server says what placement decided and what the user changed, and nothing else."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.backends.sglang import server_main
from slime.backends.sglang.launch import PYTHON_VARIABLE, limits_of_sampling, server_command, shared_nccl_settings


def spec(**changes) -> EngineSpec:
    values = dict(
        index=2, host="127.0.0.1", port=15000, num_devices=1, device="cpu", device_ids=(), model_path="/models/m",
        dtype="bfloat16", threads=3, log_path=Path("/tmp/log"), weights_dir=Path("/tmp/w"), seed=44, nccl_port=15001,
    )  # fmt: skip
    return EngineSpec(**{**values, **changes})


def options(argv: list[str]) -> dict[str, str | list[str] | None]:
    """Flag -> its value, list of values, or None for a switch."""
    assert argv[1] == server_main.__file__
    found: dict[str, list[str]] = {}
    for word in argv[2:]:
        if word.startswith("--"):
            assert word not in found, f"{word} is given twice"
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return {flag: None if not v else v[0] if len(v) == 1 else v for flag, v in found.items()}


@pytest.fixture(autouse=True)
def no_interpreter_in_the_environment(monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)


def test_placement_decides_model_address_devices_and_seed():
    argv, _ = server_command(Namespace(), spec())
    given = options(argv)
    assert argv[0] == sys.executable
    expected = {
        "--model-path": "/models/m", "--host": "127.0.0.1", "--port": "15000", "--nccl-port": "15001",
        "--tp-size": "1", "--random-seed": "44", "--dtype": "bfloat16", "--device": "cpu",
        "--skip-server-warmup": None, "--enable-metrics": None,
    }  # fmt: skip
    assert expected.items() <= given.items()


def test_on_a_cpu_nothing_that_needs_a_gpu_is_asked_for():
    argv, env = server_command(Namespace(), spec())
    given = options(argv)
    assert given["--attention-backend"] == "torch_native"
    assert given["--sampling-backend"] == "pytorch"
    assert given["--cuda-graph-backend-decode"] == given["--cuda-graph-backend-prefill"] == "disabled"
    assert env["SGLANG_USE_CPU_ENGINE"] == "1"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["CUDA_VISIBLE_DEVICES"] == ""


def test_on_gpus_the_server_sees_its_devices_only():
    argv, env = server_command(Namespace(), spec(device="cuda", num_devices=2, device_ids=(4, 5)))
    given = options(argv)
    assert env["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert given["--tp-size"] == "2"
    assert "--attention-backend" not in given and "--enable-memory-saver" not in given


def test_pipeline_stages_share_an_engines_devices_with_tensor_ranks():
    args = Namespace(sglang_pp_size=2)
    given = options(server_command(args, spec(device="cuda", num_devices=8, device_ids=tuple(range(8))))[0])
    assert (given["--tp-size"], given["--pp-size"]) == ("4", "2")


def test_memory_that_is_to_be_released_is_saved_and_not_captured_in_prefill_graphs():
    args = Namespace(colocate=True)
    shared = spec(device="cuda", device_ids=(0,), gives_memory_back=True)
    given = options(server_command(args, shared)[0])
    assert "--enable-memory-saver" in given and "--mem-fraction-static" not in given
    assert given["--cuda-graph-backend-prefill"] == "disabled"
    assert "--enable-memory-saver" not in options(server_command(args, spec())[0])


@pytest.mark.parametrize(
    ("args", "changes", "is_told"),
    [
        (Namespace(colocate=True), {"gives_memory_back": True}, True),
        (Namespace(colocate=True), {"overrides": {"enable_memory_saver": True}}, True),
        (Namespace(colocate=True), {}, False),
    ],
    ids=["it takes turns", "its group says so", "it keeps its memory"],
)
def test_graphs_lie_in_memory_that_can_be_released_only_where_it_is(args, changes, is_told):
    """Else ranks of an engine would copy what they add up for nothing."""
    _, env = server_command(args, spec(device="cuda", device_ids=(0,), **changes))
    assert (env.get("SGLANG_MEMORY_SAVER_CUDA_GRAPH") == "true") is is_told


def test_an_engine_beside_a_trainer_that_stays_takes_its_share_of_the_gpu():
    args = Namespace(colocate=True, offload_rollout=False, engine_memory_fraction=0.42)
    gpu = spec(device="cuda", device_ids=(0,))
    given = options(server_command(args, gpu)[0])
    assert given["--mem-fraction-static"] == "0.42" and "--enable-memory-saver" not in given
    args.sglang_mem_fraction_static = 0.3
    assert options(server_command(args, gpu)[0])["--mem-fraction-static"] == "0.3"


def test_changed_sglang_flags_are_passed_through_and_defaults_are_not():
    args = Namespace(
        sglang_mem_fraction_static=0.4,
        sglang_enable_deterministic_inference=True,
        sglang_context_length=4096,
        sglang_cuda_graph_bs_decode=[1, 2, 4],
        sglang_log_level="info",  # SGLang's default
        sglang_max_total_tokens=None,
        sglang_enable_tf32_matmul=False,
    )
    given = options(server_command(args, spec())[0])
    assert given["--mem-fraction-static"] == "0.4"
    assert given["--enable-deterministic-inference"] is None
    assert given["--context-length"] == "4096"
    assert given["--cuda-graph-bs-decode"] == ["1", "2", "4"]
    assert given["--no-enable-tf32-matmul"] is None
    assert given["--max-total-tokens"] == "20000"
    assert "--log-level" not in given


def test_the_user_may_choose_another_dtype_and_cpu_setting_but_not_another_address():
    args = Namespace(sglang_dtype="float32", sglang_max_total_tokens=500, sglang_host="0.0.0.0", sglang_device="cuda")
    given = options(server_command(args, spec())[0])
    assert given["--dtype"] == "float32"
    assert given["--max-total-tokens"] == "500"
    assert (given["--host"], given["--device"]) == ("127.0.0.1", "cpu")


def test_metrics_asked_for_by_hand_are_not_asked_for_twice():
    assert "--enable-metrics" in options(server_command(Namespace(sglang_enable_metrics=True), spec())[0])


def test_a_json_value_is_written_as_json():
    args = Namespace(sglang_cuda_graph_config={"decode": {"backend": "disabled"}})
    given = options(server_command(args, spec())[0])
    assert json.loads(given["--cuda-graph-config"]) == {"decode": {"backend": "disabled"}}


def test_another_interpreter_may_have_sglang(monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, "/elsewhere/bin/python")
    assert server_command(Namespace(), spec())[0][0] == "/elsewhere/bin/python"


def test_the_trainers_rendezvous_is_not_inherited(monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("KEPT", "y")
    _, env = server_command(Namespace(), spec())
    assert env["KEPT"] == "y"
    assert not {"MASTER_ADDR", "RANK", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & env.keys()


def test_ranks_on_one_cpu_host_meet_on_loopback(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert server_command(Namespace(), spec())[1]["GLOO_SOCKET_IFNAME"] == "lo"
    assert "GLOO_SOCKET_IFNAME" not in server_command(Namespace(), spec(host="10.0.0.7"))[1]


def test_the_keys_of_a_stock_server_stand_in_its_environment_and_not_on_its_command_line():
    argv, env = server_command(Namespace(sglang_api_key="-secret", sglang_admin_api_key="more"), spec())
    assert not [word for word in argv if "secret" in word or "more" in word or "api-key" in word]
    assert (env["SLIME_API_KEY"], env["SLIME_ADMIN_API_KEY"]) == ("-secret", "more")


def in_sglangs_place(folder: Path, **modules: str) -> None:
    """A package `sglang` with these modules, in a folder that an interpreter without slime looks into."""
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").touch()
    for name, text in modules.items():
        (folder / "sglang" / f"{name}.py").write_text(text)


def reply_of_the_server(folder: Path, argv: list[str], env: dict[str, str]) -> list:
    done = subprocess.run(argv, env=env, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def test_a_stock_server_reads_its_keys_as_arguments_that_the_system_does_not_show(tmp_path):
    in_sglangs_place(
        tmp_path,
        launch_server="import json, os, pathlib, sys\n"
        "shown = pathlib.Path('/proc/self/cmdline').read_text().split(chr(0))\n"
        "keys = [name for name in os.environ if name.startswith('SLIME_')]\n"
        "print(json.dumps([__name__, sys.argv[1:], shown[1:-1], keys]))\n",
    )
    argv, env = server_command(Namespace(sglang_api_key="-secret", sglang_admin_api_key="more"), spec())
    name, seen, shown, keys = reply_of_the_server(tmp_path, argv, env)
    assert (name, keys) == ("__main__", [])
    assert seen == [*argv[2:], "--api-key=-secret", "--admin-api-key=more"]
    assert shown == argv[1:]


def test_no_process_of_a_stock_server_sees_megatron(tmp_path):
    """megatron-core would set torch_memory_saver to a mode in which CUDA graphs do not give their memory back."""
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()
    in_sglangs_place(
        tmp_path,
        scheduler="def tells(queue):\n"
        "    try:\n"
        "        import megatron\n"
        "    except ImportError:\n"
        "        queue.put(False)\n"
        "    else:\n"
        "        queue.put(True)\n",
        launch_server="import json, multiprocessing, queue\n"
        "from sglang import scheduler\n"
        "if __name__ == '__main__':\n"
        "    replies = []\n"
        "    mine = queue.Queue()\n"
        "    scheduler.tells(mine)\n"
        "    replies.append(mine.get())\n"
        "    for method in ('spawn', 'fork'):\n"
        "        context = multiprocessing.get_context(method)\n"
        "        its = context.Queue()\n"
        "        child = context.Process(target=scheduler.tells, args=(its,))\n"
        "        child.start()\n"
        "        replies.append(its.get(timeout=60))\n"
        "        child.join()\n"
        "    print(json.dumps(replies))\n",
    )
    argv, env = server_command(Namespace(), spec())
    assert reply_of_the_server(tmp_path, argv, env) == [False, False, False]


@pytest.mark.parametrize(
    ("rollout", "evaluation", "limited"),
    [
        ((1.0, -1), [], False),
        ((1.0, 20), [], True),
        ((0.95, -1), [], True),
        ((1.0, -1), [(None, None), (1.0, 1)], False),  # greedy needs no such kernel
        ((1.0, -1), [(None, None), (0.7, None)], True),
        ((1.0, -1), [(1.0, 40)], True),
    ],
)
def test_a_run_that_limits_what_may_be_sampled_says_so(rollout, evaluation, limited):
    datasets = [Namespace(top_p=top_p, top_k=top_k) for top_p, top_k in evaluation]
    args = Namespace(rollout_top_p=rollout[0], rollout_top_k=rollout[1], eval_datasets=datasets)
    assert (limits_of_sampling(args) is not None) == limited


def test_health_answers_while_an_engine_is_paused():
    _, env = server_command(Namespace(), spec())
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"


def test_a_model_on_disk_keeps_the_server_off_the_network(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert server_command(Namespace(), spec(model_path=str(tmp_path)))[1]["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in server_command(Namespace(), spec(model_path="someone/some-model"))[1]


@pytest.mark.parametrize(
    ("environment", "changes", "expected"),
    [({}, {}, "0"), ({"NCCL_CUMEM_ENABLE": "1"}, {}, "1"), ({}, {"sglang_enable_symm_mem": True}, "1")],
)
def test_a_trainer_reads_nccls_buffers_in_the_form_in_which_a_server_writes_them(
    monkeypatch, environment, changes, expected
):
    """What SGLang's own start does: off, unless the environment says otherwise or symmetric memory needs it."""
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shared_nccl_settings(Namespace(**changes)) == {"NCCL_CUMEM_ENABLE": expected}
