"""The command line of an engine, and that it is one the server accepts."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.backends.embedded.launch import server_command
from slime.backends.embedded.server import build_parser, check_arguments, end_tokens_of


def spec(folder: Path, **fields) -> EngineSpec:
    values = dict(
        index=3,
        host="127.0.0.1",
        port=15003,
        num_devices=1,
        device="cpu",
        device_ids=(),
        model_path=str(folder),
        dtype="float32",
        threads=2,
        log_path=folder / "log",
        weights_dir=folder / "weights",
        seed=77,
    )
    return EngineSpec(**(values | fields))


def parsed(argv: list[str]) -> Namespace:
    assert argv[:3] == [sys.executable, "-m", "slime.backends.embedded.server"]
    parser = build_parser()
    arguments = parser.parse_args(argv[3:])
    check_arguments(parser, arguments)
    return arguments


def test_the_spec_reaches_the_server(tiny_llama: Path):
    argv, _ = server_command(Namespace(), spec(tiny_llama))
    arguments = parsed(argv)
    assert (arguments.model_path, arguments.host, arguments.port) == (str(tiny_llama), "127.0.0.1", 15003)
    assert (arguments.dtype, arguments.threads, arguments.random_seed) == ("float32", 2, 77)
    assert arguments.weights_dir == str(tiny_llama / "weights")
    assert arguments.max_running_requests == 64 and arguments.context_length is None


def test_sglang_flags_that_mean_something_here_are_passed_on(tiny_llama: Path):
    args = Namespace(
        sglang_context_length=512,
        sglang_max_running_requests=9,
        sglang_max_total_tokens=4096,
        sglang_served_model_name="policy",
        sglang_log_level="warning",
        sglang_attention_backend="fa3",
        sglang_api_key=None,
        rollout_num_engines=4,
    )
    arguments = parsed(server_command(args, spec(tiny_llama))[0])
    assert (arguments.context_length, arguments.max_running_requests) == (512, 9)
    assert (arguments.max_total_tokens, arguments.served_model_name) == (4096, "policy")
    assert arguments.log_level == "warning" and arguments.api_key is None
    assert arguments.kv_memory_share == pytest.approx(0.3 / 4)


def test_the_key_is_not_on_the_command_line(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Every user of the machine can read that."""
    argv, env = server_command(Namespace(sglang_api_key="secret"), spec(tiny_llama))
    assert "secret" not in " ".join(argv)
    monkeypatch.setenv("SLIME_API_KEY", env["SLIME_API_KEY"])
    assert parsed(argv).api_key == "secret"


def test_threads_wait_passively_and_the_environment_is_whole(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOMETHING_ELSE", "kept")
    _, env = server_command(Namespace(), spec(tiny_llama))
    assert env["OMP_NUM_THREADS"] == "2" and env["OMP_WAIT_POLICY"] == "PASSIVE" and env["HF_HUB_OFFLINE"] == "1"
    assert env["SOMETHING_ELSE"] == "kept" and env["PATH"] == os.environ["PATH"]


def test_the_command_starts_from_any_folder(tiny_llama: Path, tmp_path: Path):
    argv, env = server_command(Namespace(), spec(tiny_llama))
    done = subprocess.run([*argv[:3], "--help"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--max-running-requests" in done.stdout


def test_planning_imports_neither_torch_nor_transformers():
    code = (
        "import sys, slime.backends.embedded.launch as l; "
        "assert not {'torch', 'transformers', 'starlette'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--host", "0.0.0.0"], "add --api-key"),
        (["--threads", "0"], "must be at least 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tiny_llama: Path, capsys: pytest.CaptureFixture[str], extra, words):
    parser = build_parser()
    with pytest.raises(SystemExit) as exit_info:
        check_arguments(parser, parser.parse_args(["--model-path", str(tiny_llama), *extra]))
    assert exit_info.value.code == 2 and words in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parser = build_parser()
    with pytest.raises(SystemExit):
        check_arguments(parser, parser.parse_args(["--model-path", str(tmp_path)]))
    assert "holds no config.json" in capsys.readouterr().err


def test_end_tokens_come_from_all_places_that_name_them(tmp_path: Path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert end_tokens_of(str(tmp_path), Namespace(eos_token_id=7), None) == {5, 6, 7}
    assert end_tokens_of(str(tmp_path / "none"), Namespace(eos_token_id=None), None) == frozenset()
