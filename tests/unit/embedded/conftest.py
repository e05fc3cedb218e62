"""Tiny engines: a served fp32 llama without a thread, stepped by the test itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slime.backends.embedded.engine import Engine, EngineSettings, make_request
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.protocol import SamplingParams
from slime.backends.embedded.scheduler import Request
from tests.contracts.engine.tiny_model import save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied two-layer llama in HuggingFace format."""
    return save_tiny_model(tmp_path_factory.mktemp("embedded") / "llama")


@pytest.fixture(scope="session")
def served(tiny_llama: Path) -> ServedModel:
    """The tiny llama in fp32; tests leave its weights as they were."""
    return ServedModel(tiny_llama, torch.float32)


@pytest.fixture
def new_engine(served: ServedModel) -> Callable[..., Engine]:
    """Engines over the tiny llama, stepped by hand."""

    def build(**settings: Any) -> Engine:
        return Engine(served, EngineSettings(**({"max_running_requests": 8, "context_length": 256} | settings)))

    return build


def queue(engine: Engine, prompt: list[int], max_new_tokens: int = 8, **fields: Any) -> Request:
    """A request in the engine's queue; fields of SamplingParams and of Request may be mixed."""
    names = SamplingParams.__dataclass_fields__
    sampling = SamplingParams(**{name: fields.pop(name) for name in list(fields) if name in names})
    request = make_request(
        engine,
        rid=fields.pop("rid", f"r{len(engine.scheduler)}"),
        prompt=prompt,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        wants_log_probs=True,
        **fields,
    )
    engine.scheduler.add(request)
    return request


def random_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids of the tiny vocabulary, none of them special."""
    return torch.randint(3, 180, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
