"""The engine under test: embedded by default, stock SGLang (CPU, GPU) under the marker `sglang`, or `--engine-url`."""

import importlib.util
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from slime.arguments.parser import read_command_line
from slime.backends.base import EngineSpec
from slime.backends.sglang.client import SGLangClient
from slime.backends.sglang.launch import PYTHON_VARIABLE
from slime.utils.processes import ServerError, ServerProcess, free_port
from tests.contracts.engine.speaking import Engine, Reference
from tests.contracts.engine.tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parents[3]
HOST = "127.0.0.1"
HEADS_FOR_GPUS = {"hidden_size": 256, "head_dim": 64}
START_TIMEOUT_S = {"embedded": 120.0, "sglang": 280.0}


@dataclass(frozen=True)
class Stock:
    """How a stock SGLang server is started: as slime does it, on `device`, in `dtype`, with more of slime's flags."""

    device: str
    dtype: str
    flags: tuple[str, ...] = ()

    def command(self, model: Path, port: int, folder: Path) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; on a GPU its memory can be given back, as in a colocated run."""
        from slime.backends.sglang.launch import server_command

        given = read_command_line(self.flags)
        given.problems.raise_if_any()
        args = Namespace(**{**given.values, "colocate": self.device == "cuda"})
        argv, env = server_command(args, _spec(model, port, folder, self.device, self.dtype))
        argv[0] = _stock_interpreter()
        env.pop(PYTHON_VARIABLE, None)
        return argv, env


def _stock_interpreter() -> str:
    """The Python that has stock SGLang: named by the environment, or made by scripts/sglang_cpu, or this one."""
    if named := os.environ.get(PYTHON_VARIABLE):
        return named
    python = Path(os.environ.get("SLIME_SGLANG_VENV") or ROOT / ".venv-sglang") / "bin" / "python"
    if python.exists():
        return str(python)
    if importlib.util.find_spec("sglang") is None:
        pytest.fail(
            f"There is no stock SGLang: not here, nor at {python}. Set it up with `bash scripts/sglang_cpu/setup.sh` "
            f"(3 minutes, 3 GB), or name an interpreter that has it in the environment variable {PYTHON_VARIABLE}.",
            pytrace=False,
        )
    return sys.executable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-url", help="run the engine contract against this server instead of starting one")
    parser.addoption("--engine-device", default="cpu", choices=["cpu", "cuda"], help="where stock SGLang runs")
    parser.addoption("--engine-model", type=Path, help="HuggingFace folder for it; default: a tiny random one")
    parser.addoption("--engine-dtype", help="its number format; default: float32 on cpu, bfloat16 on cuda")
    parser.addoption(
        "--engine-flags", default="", help="more flags of slime for it, e.g. --sglang-attention-backend=fa3"
    )


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
def stock(pytestconfig: pytest.Config) -> Stock:
    """How stock SGLang is started, as the command line of the tests says."""
    device = pytestconfig.getoption("--engine-device", default="cpu")
    dtype = pytestconfig.getoption("--engine-dtype", default=None) or ("bfloat16" if device == "cuda" else "float32")
    return Stock(device, dtype, tuple(pytestconfig.getoption("--engine-flags", default="").split()))


@pytest.fixture(scope="session")
def stock_model(
    pytestconfig: pytest.Config, stock: Stock, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What stock SGLang serves: the tiny llama in fp32; else a tiny qwen3 whose heads suit the kernels of GPUs."""
    if given := pytestconfig.getoption("--engine-model", default=None):
        return Path(given)
    if stock.dtype == "float32":
        return tiny_llama
    return save_tiny_model(
        tmp_path_factory.mktemp("models") / "tiny-qwen3", "qwen3", **HEADS_FOR_GPUS, dtype=stock.dtype
    )


@pytest.fixture(scope="session")
def start_engine(stock: Stock, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], Engine]]:
    """Starts an engine of a kind on a model folder and waits until it is healthy; all end with the session."""
    servers: list[ServerProcess] = []

    def start(kind: str, model: Path) -> Engine:
        folder = tmp_path_factory.mktemp(kind)
        port = free_port(HOST)
        argv, env = _embedded(model, port, folder) if kind == "embedded" else stock.command(model, port, folder)
        server = ServerProcess(f"{kind} engine", argv, env, folder / "engine.log")
        servers.append(server)
        server.start()
        try:
            server.wait_until_healthy(f"http://{HOST}:{port}/health", START_TIMEOUT_S[kind])
        except ServerError as error:
            pytest.fail(str(error), pytrace=False)
        if kind == "sglang" and stock.device == "cuda":
            client = SGLangClient(f"http://{HOST}:{port}", name="the engine", timeout_s=500)
            client.warm_up({"top_k": 2, "top_p": 0.9, "min_p": 0.1})  # else the first test to sample so waits for nvcc
            client.close()
        return Engine(f"http://{HOST}:{port}", kind, folder / "weights")

    yield start
    for server in servers:
        server.terminate(1.0)


@pytest.fixture(scope="session")
def engine(request: pytest.FixtureRequest, start_engine: Callable[[str, Path], Engine]) -> Iterator[Engine]:
    """A running engine, one for the whole session; a test leaves it unpaused and with the weights it found."""
    if request.param == "url":
        yield Engine(request.config.getoption("--engine-url"), "url")
    else:
        model = request.getfixturevalue("tiny_llama" if request.param == "embedded" else "stock_model")
        yield start_engine(request.param, model)


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


def _spec(model: Path, port: int, folder: Path, device: str = "cpu", dtype: str = "float32") -> EngineSpec:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return EngineSpec(
        index=0,
        host=HOST,
        port=port,
        num_devices=1,
        device=device,
        device_ids=(int(visible),) if device == "cuda" else (),
        model_path=str(model),
        dtype=dtype,
        threads=1,
        log_path=folder / "engine.log",
        weights_dir=folder / "weights",
        seed=1,
        nccl_port=free_port(HOST),
        gives_memory_back=device == "cuda",
    )
