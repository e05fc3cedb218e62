"""Engines that run elsewhere: found out about, refused where weights could not be sent, never ended."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from slime.backends.base import EngineSpec
from slime.ray import external
from slime.ray.engine_places import ExternalEngine
from slime.ray.external import find_external, normalized
from slime.weight_sync.base import EngineError

INFO = {"version": "0.5.16", "tp_size": 2, "pp_size": 2, "device": "cuda", "dtype": "bfloat16", "model_path": "/m"}
MODEL = {"model_path": "/m", "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """A run of a llama, whose external engine answers with `info` and `model`."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = Namespace(hf_checkpoint=str(tmp_path), device="cuda", info=dict(INFO), model=dict(MODEL))

    class Client:
        def __init__(self, url: str, name: str, timeout_s: float) -> None:
            self.url, self.name = url, name

        def server_info(self) -> Any:
            return given.info

        def model_info(self) -> Any:
            return given.model

        def close(self) -> None: ...

    monkeypatch.setattr(external, "SGLangClient", Client)
    return given


def find(args: Namespace, address: str = "h:30000") -> EngineSpec:
    return find_external(args, 1, address, Path("/w"))


def test_an_address_may_be_a_url_and_ipv6() -> None:
    assert normalized("h:1") == normalized("http://h:1") == ("h", 1)
    assert normalized("[::1]:2") == ("::1", 2)
    with pytest.raises(ValueError, match="not host:port"):
        normalized("h")


def test_an_engine_tells_its_size_and_its_part(args: Namespace) -> None:
    spec = find(args, "[::1]:30000")
    assert (spec.url, spec.num_devices, spec.worker_type) == ("http://[::1]:30000", 4, "regular")
    args.info |= {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 9000}
    assert (find(args).worker_type, find(args).bootstrap_port) == ("prefill", 9000)


@pytest.mark.parametrize(
    ("info", "model", "complaint"),
    [
        ({"version": "0.5.15"}, {}, "SGLang 0.5.15; weights can be sent to 0.5.16 or newer"),
        ({"version": None}, {}, "of no version"),
        ({}, {"model_type": "qwen2"}, "model_type is qwen2"),
        ({}, {"architectures": ["Other"]}, "architectures is ['Other']"),
    ],
)
def test_an_engine_that_cannot_be_used_is_named(args: Namespace, info: Any, model: Any, complaint: str) -> None:
    args.info |= info
    args.model |= model
    with pytest.raises(EngineError) as error:
        find(args)
    assert str(error.value).startswith("external engine 1 (http://h:30000)")
    assert complaint in str(error.value)


def test_nothing_here_ends_or_starts_it(args: Namespace) -> None:
    engine = ExternalEngine(args, 0, "h:30000", Path("/w"))
    engine.begin()
    assert engine.processes() == engine.begin_to_stop() == []
    engine.kill("did not answer for 30 s", 1)
    assert engine.death is not None and engine.death.startswith("external engine 0 (http://h:30000) did not answer")
    assert not engine.gives_memory_back
