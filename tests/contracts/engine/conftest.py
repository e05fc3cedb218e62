"""The engine under test: embedded by default, stock SGLang on CPU under the marker `sglang`, or any `--engine-url`."""

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slime.backends.base import EngineSpec
from slime.utils.processes import ServerError, ServerProcess, free_port
from tests.contracts.engine.speaking import Engine, Reference
from tests.contracts.engine.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[3]
HOST = "127.0.0.1"
START_TIMEOUT_S = {"embedded": 120.0, "sglang": 280.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-url", help="run the engine contract against this server instead of starting one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" not in metafunc.fixturenames:
        return
    if metafunc.config.getoption("--engine-url", default=None):
        kinds: list[object] = ["url"]
    else:
        kinds = ["embedded", pytest.param("sglang", marks=[pytest.mark.sglang, pytest.mark.timeout(600)])]
    metafunc.parametrize("engine", kinds, indirect=True, scope="session")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in HuggingFace format, fp32, with a tokenizer and a chat template."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def start_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], Engine]]:
    """Starts an engine of a kind on a model folder and waits until it is healthy; all end with the session."""
    servers: list[ServerProcess] = []

    def start(kind: str, model: Path) -> Engine:
        folder = tmp_path_factory.mktemp(kind)
        port = free_port(HOST)
        argv, env = (_embedded if kind == "embedded" else _stock_sglang)(model, port, folder)
        server = ServerProcess(f"{kind} engine", argv, env, folder / "engine.log")
        servers.append(server)
        server.start()
        try:
            server.wait_until_healthy(f"http://{HOST}:{port}/health", START_TIMEOUT_S[kind])
        except ServerError as error:
            pytest.fail(str(error), pytrace=False)
        return Engine(f"http://{HOST}:{port}", kind, folder / "weights")

    yield start
    for server in servers:
        server.terminate(1.0)


@pytest.fixture(scope="session")
def engine(
    request: pytest.FixtureRequest, tiny_llama: Path, start_engine: Callable[[str, Path], Engine]
) -> Iterator[Engine]:
    """A running engine, one for the whole session; a test leaves it unpaused and with the weights it found."""
    if request.param == "url":
        yield Engine(request.config.getoption("--engine-url"), "url")
    else:
        yield start_engine(request.param, tiny_llama)


@pytest.fixture(scope="session")
def reference(engine: Engine) -> Reference:
    """The same model under transformers, in fp32."""
    return Reference(engine.model_path)


@pytest.fixture(autouse=True)
def left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test nothing is in flight and the engine is not paused, whatever the test did."""
    yield
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").settle()


def _embedded(model: Path, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    from slime.backends.embedded.launch import server_command

    (folder / "weights").mkdir(mode=0o700)
    return server_command(Namespace(), _spec(model, port, folder))


def _stock_sglang(model: Path, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
    from slime.backends.sglang.launch import PYTHON_VARIABLE, server_command

    venv = Path(os.environ.get("SLIME_SGLANG_VENV") or ROOT / ".venv-sglang")
    python = venv / "bin" / "python"
    if not python.exists():
        pytest.fail(
            f"There is no stock SGLang at {venv}. Set it up with `bash scripts/sglang_cpu/setup.sh` (3 minutes, 3 GB), "
            "or name its virtual environment in the environment variable SLIME_SGLANG_VENV.",
            pytrace=False,
        )
    argv, env = server_command(Namespace(), _spec(model, port, folder))
    argv[0] = str(python)
    env.pop(PYTHON_VARIABLE, None)
    return argv, env


def _spec(model: Path, port: int, folder: Path) -> EngineSpec:
    return EngineSpec(
        index=0,
        host=HOST,
        port=port,
        num_devices=1,
        device="cpu",
        device_ids=(),
        model_path=str(model),
        dtype="float32",
        threads=1,
        log_path=folder / "engine.log",
        weights_dir=folder / "weights",
        seed=1,
        nccl_port=free_port(HOST),
    )
