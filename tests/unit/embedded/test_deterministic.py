"""Deterministic mode: a reply (tokens and log-probs, bit by bit) depends on weights, prompt and seed only."""

import random
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from slime.backends.base import EngineSpec
from slime.backends.embedded.attention import PrefillSegment
from slime.backends.embedded.deterministic import (
    BLOCK_ROWS,
    AttentionProof,
    DeterminismError,
    SteadyMatrix,
    prove_matrix,
    prove_rows,
    runs_of,
)
from slime.backends.embedded.engine import Engine, EngineSettings
from slime.backends.embedded.launch import server_command
from slime.backends.embedded.linear import DenseMatrix, Matrix, PackedMatrix, can_pack
from slime.backends.embedded.model import ServedModel
from slime.backends.embedded.protocol import RequestError
from slime.backends.embedded.rotation import RotationTable
from slime.backends.embedded.scheduler import Request
from slime.utils.processes import ServerProcess, free_port
from tests.contracts.engine.tiny_model import save_tiny_model
from tests.unit.embedded.conftest import queue, random_prompt

ODD = {"hidden_size": 60, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "odd llama": ("llama", ODD),
    "qwen3": ("qwen3", {"num_key_value_heads": 4}),
    "mistral that sees 20 back": ("mistral", {"sliding_window": 20}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
}


@dataclass(frozen=True)
class Asked:
    """One request, to be sent again and again."""

    prompt_length: int
    new_tokens: int
    fields: tuple[tuple[str, Any], ...] = ()

    def send(self, engine: Engine, index: int) -> Request:
        prompt = random_prompt(self.prompt_length, seed=index)
        return queue(engine, prompt, self.new_tokens, rid=f"p{index}", sampling_seed=index, **dict(self.fields))


PROBES = [
    Asked(9, 12),
    Asked(1, 66, (("top_p", 0.9),)),
    Asked(63, 8, (("top_k", 5), ("temperature", 0.7))),
    Asked(80, 5, (("temperature", 0.0), ("top_logprobs", 2), ("token_ids_logprob", (7,)))),
    Asked(30, 10, (("logprob_start", 3), ("repetition_penalty", 1.2), ("min_p", 0.02))),
]


def reply_of(request: Request) -> tuple[Any, ...]:
    """All that a client is told, floats exact."""
    out, prompt = request.output_log_probs, request.input_log_probs
    return request.output, out.values, out.top, out.chosen, prompt.values, request.finish.shown


@pytest.fixture(scope="module")
def served_families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], ServedModel]:
    """Models by family and dtype, each built once."""
    folder, made = tmp_path_factory.mktemp("deterministic"), {}

    def build(family: str, dtype: torch.dtype) -> ServedModel:
        if (family, dtype) not in made:
            model_type, overrides = FAMILIES[family]
            path = folder / family
            if not path.exists():
                save_tiny_model(path, model_type, **overrides)
            made[family, dtype] = ServedModel(path, dtype)
        return made[family, dtype]

    return build


def steady_engine(model: ServedModel, **settings: Any) -> Engine:
    return Engine(model, EngineSettings(**({"context_length": 300, "deterministic": True} | settings)))


def replies_alone(model: ServedModel) -> list[tuple[Any, ...]]:
    """The probes' replies, one after another."""
    replies = []
    engine = steady_engine(model, max_running_requests=2)
    for index, asked in enumerate(PROBES):
        request = asked.send(engine, index)
        engine.run_until_idle()
        replies.append(reply_of(request))
    return replies


def replies_amid_others(model: ServedModel, num_others: int, seed: int, **settings: Any) -> list[tuple[Any, ...]]:
    """The probes' replies from an engine where others come, run and are aborted at random."""
    chance = random.Random(seed)
    engine = steady_engine(model, **settings)
    others = [Asked(chance.choice([1, 5, 9, 30, 64, 90]), chance.randint(1, 40)) for _ in range(num_others)]
    arrivals = [*enumerate(PROBES), *((100 + index, other) for index, other in enumerate(others))]
    chance.shuffle(arrivals)
    sent: dict[int, Request] = {}
    for index, asked in arrivals:
        sent[index] = asked.send(engine, index)
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            engine.step()
        if chance.random() < 0.1:
            victims = {request for number, request in sent.items() if number >= 100 and chance.random() < 0.3}
            engine.abort(victims.__contains__)
    if chance.random() < 0.5:
        engine.pause("in_place")
        engine.resume()
    engine.run_until_idle()
    return [reply_of(sent[index]) for index in range(len(PROBES))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_is_bitwise_the_same_alone_and_amid_others(served_families, family: str, dtype: torch.dtype):
    model = served_families(family, dtype)
    expected = replies_alone(model)
    assert all(len(reply[0]) == asked.new_tokens for reply, asked in zip(expected, PROBES, strict=True))
    assert replies_amid_others(model, num_others=10, seed=1, max_running_requests=7, max_total_tokens=700) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_63_others_change_nothing(served_families, dtype: torch.dtype):
    model = served_families("llama", dtype)
    assert replies_amid_others(model, num_others=63, seed=3) == replies_alone(model)


def test_two_threads_change_no_reply_with_its_company(served_families):
    torch.set_num_threads(2)
    try:
        model = ServedModel(served_families("odd llama", torch.float32).path, torch.float32)
        assert replies_amid_others(model, num_others=30, seed=4, threads=2) == replies_alone(model)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_weights_that_came_by_an_update_compute_as_those_that_were_loaded(served_families, dtype: torch.dtype):
    loaded = served_families("odd llama", dtype)
    updated = ServedModel(loaded.path, dtype)
    engine = steady_engine(updated)
    kept = {name: loaded.weights.read(name).clone() for name in loaded.weights.names()}
    updated.weights.write((name, tensor * 0.5) for name, tensor in kept.items())
    queue(engine, random_prompt(20), 5)
    engine.run_until_idle()
    engine.release_memory(["weights", "kv_cache"])
    engine.resume_memory(["weights", "kv_cache"])
    updated.weights.write(kept.items())
    assert replies_alone(updated) == replies_alone(loaded)


def test_identical_prompts_give_each_the_reply_it_has_alone(served_families):
    model = served_families("llama", torch.float32)

    def outputs(seeds: list[int], engine: Engine) -> list[tuple[Any, ...]]:
        requests = [queue(engine, random_prompt(40), 9, sampling_seed=seed) for seed in seeds]
        engine.run_until_idle()
        return [reply_of(request) for request in requests]

    together = outputs([1, 2, 3], steady_engine(model))
    assert together == [outputs([seed], steady_engine(model))[0] for seed in (1, 2, 3)]
    assert len({tuple(reply[0]) for reply in together}) == 3


def test_a_prompt_never_continues_anothers_keys_and_none_is_retracted(served_families):
    engine = steady_engine(served_families("llama", torch.float32), max_total_tokens=310)
    first = queue(engine, random_prompt(40), 60)
    engine.step()
    rest = [queue(engine, [*random_prompt(40), 5 + index], 60) for index in range(5)]
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert most == 3  # of 101 positions each, as long as the longest
    assert all(r.cached_tokens == 0 and r.num_retractions == 0 and len(r.output) == 60 for r in [first, *rest])


def test_a_pause_that_would_compute_replies_again_is_refused(served_families):
    engine = steady_engine(served_families("llama", torch.float32))
    with pytest.raises(RequestError, match="computed again as if it were a prompt"):
        engine.pause("retract")
    assert not engine.is_paused


def test_requests_without_a_seed_do_not_tell_in_which_order_they_came(served_families):
    engine = steady_engine(served_families("llama", torch.float32), random_seed=5)
    first, second = queue(engine, random_prompt(9), 12), queue(engine, random_prompt(9), 12)
    other = steady_engine(served_families("llama", torch.float32), random_seed=6)
    third = queue(other, random_prompt(9), 12)
    engine.run_until_idle()
    other.run_until_idle()
    assert reply_of(first) == reply_of(second) == reply_of(third)


# The parts


def matrices(dtype: torch.dtype) -> list[Matrix]:
    kinds = [DenseMatrix, *([PackedMatrix] if can_pack(dtype) else [])]
    made: list[Matrix] = []
    for kind in kinds:
        for rows, columns in ((97, 37), (130, 1536), (64, 24)):
            matrix = kind(rows, columns, dtype)
            matrix.write(0, torch.randn(rows, columns).to(dtype))
            matrix.flush()
            made.append(matrix)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_row_of_a_product_is_the_same_in_every_company_and_place(dtype: torch.dtype):
    torch.manual_seed(0)
    for matrix in matrices(dtype):
        width = matrix.dense().shape[1]
        steady = SteadyMatrix(matrix, prove_matrix(*matrix.dense().shape, matrix, None))
        x = torch.randn(3 * BLOCK_ROWS + 5, width).to(dtype)
        alone = torch.cat([steady.product(row[None], None) for row in x])
        for count in (2, 3, 4, 17, 18, 63, 64, 65, 66, 130, x.shape[0]):
            chosen = torch.randperm(x.shape[0])[:count]
            assert torch.equal(steady.product(x[chosen], None), alone[chosen]), (width, count)
        torch.testing.assert_close(alone.float(), matrix.product(x, None).float(), rtol=1e-2, atol=1e-2)


def test_row_counts_that_change_bits_are_padded_to_ones_that_do_not():
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1.0 if x.shape[0] in (1, 2, 10) else x.clone()

    sizes = prove_rows(function, torch.randn(BLOCK_ROWS, 5))
    assert sizes[1:5] == (3, 3, 3, 4) and sizes[9:12] == (9, 11, 11) and sizes[17] == 20 and sizes[64] == 64


def test_a_function_whose_rows_feel_their_place_is_refused():
    with pytest.raises(DeterminismError, match="other bits in another place.*Start without --enable-deterministic"):
        prove_rows(lambda x: x + torch.arange(x.shape[0])[:, None], torch.randn(BLOCK_ROWS, 5))


def test_an_engine_whose_sequences_feel_each_other_does_not_start(served_families, monkeypatch: pytest.MonkeyPatch):
    """A fault put into a layer: rows of a product shift by a bit that depends on how many there are."""
    model = ServedModel(served_families("llama", torch.float32).path, torch.float32)
    steady_engine(model)
    product = SteadyMatrix.product

    def faulty(self: SteadyMatrix, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = product(self, x, bias)
        return out * (1 + 1e-6) if x.numel() // x.shape[-1] == 1 else out

    monkeypatch.setattr(SteadyMatrix, "product", faulty)
    with pytest.raises(DeterminismError, match="other logits alone than amid 5 others"):
        steady_engine(model)


def test_runs_hold_neighbours_of_equally_many_blocks():
    assert runs_of([0, 63, 64, 100, 5]) == [(0, 2, 64), (2, 4, 128), (4, 5, 64)]
    assert runs_of([7] * 39) == [(0, 16, 64), (16, 32, 64), (32, 36, 64), (36, 38, 64), (38, 39, 64)]


def test_sequences_attend_alone_where_company_would_show(served_families, monkeypatch: pytest.MonkeyPatch):
    model = served_families("llama", torch.float32)
    monkeypatch.setattr(AttentionProof, "holds", lambda *_: False)
    assert replies_amid_others(model, num_others=6, seed=6) == replies_alone(model)


def test_rotations_come_from_a_table_that_grows_block_by_block(served_families):
    model = served_families("odd llama", torch.float32)
    steady_engine(model)
    table = model.module.get_decoder().rotary_emb
    assert isinstance(table, RotationTable)
    x = torch.zeros(1)
    early = table(x, torch.tensor([[5, 3]]))[0]
    table(x, torch.tensor([[2100]]))
    cos, sin = table(x, torch.tensor([[3, 2100]]))
    assert torch.equal(cos[0, 0], early[0, 1])
    expected = table.rotary(x, torch.tensor([[3, 2100]]))
    torch.testing.assert_close((cos, sin), expected)


def test_rotations_that_longer_neighbours_change_are_refused(tmp_path: Path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    path = save_tiny_model(tmp_path / "dynamic", rope_scaling=scaling)
    with pytest.raises(DeterminismError, match="rotations of type dynamic, which longer neighbours change"):
        steady_engine(ServedModel(path, torch.float32))


def test_packed_prompts_are_those_computed_alone(served_families):
    """Logits of every prompt position, packed and by itself."""
    engine = steady_engine(served_families("odd llama", torch.bfloat16))
    prompts = [random_prompt(length, seed=length) for length in (3, 64, 50, 130, 1)]

    def logits(chosen: list[list[int]]) -> torch.Tensor:
        engine.cache.reserve(len(chosen), 130)
        starts = [sum(map(len, chosen[:index])) for index in range(len(chosen))]
        segments = [PrefillSegment(s, len(p), 0, (i,)) for i, (s, p) in enumerate(zip(starts, chosen, strict=True))]
        tokens = [token for prompt in chosen for token in prompt]
        positions = [position for prompt in chosen for position in range(len(prompt))]
        return engine.passes.prefill(tokens, positions, list(range(len(tokens))), segments)

    assert torch.equal(logits(prompts), torch.cat([logits([prompt]) for prompt in prompts]))


# Over HTTP, two engines


def test_two_servers_give_the_same_replies_in_any_order(served_families, tmp_path: Path):
    model_path = served_families("llama", torch.float32).path
    args = Namespace(deterministic_mode=True)
    processes, urls = [], []
    for index in range(2):
        spec = EngineSpec(
            index=index, host="127.0.0.1", port=free_port("127.0.0.1"), num_devices=1, device="cpu", device_ids=(),
            model_path=model_path, dtype="bfloat16", threads=1, log_path=tmp_path / f"log{index}",
            weights_dir=tmp_path, seed=index,
        )  # fmt: skip
        processes.append(ServerProcess(f"engine {index}", *server_command(args, spec), spec.log_path))
        urls.append(f"http://127.0.0.1:{spec.port}")
    try:
        for process in processes:
            process.start()
        for process, url in zip(processes, urls, strict=True):
            process.wait_until_healthy(f"{url}/health", 120)
        with httpx.Client(timeout=60, trust_env=False) as http:
            assert http.get(f"{urls[0]}/server_info").json()["enable_deterministic_inference"] is True

            def ask(place: tuple[int, str]) -> tuple[int, Any]:
                index, url = place
                sampling = {"max_new_tokens": 5 + index, "sampling_seed": index, "ignore_eos": True}
                body = {"input_ids": random_prompt(3 + 4 * index, seed=index), "sampling_params": sampling}
                reply = http.post(f"{url}/generate", json=body | {"return_logprob": True}).json()
                return index, (reply["output_ids"], reply["meta_info"]["output_token_logprobs"])

            expected = dict(ask((index, urls[0])) for index in range(12))
            places = [(index % 12, urls[index % 2]) for index in range(40)]
            random.Random(0).shuffle(places)
            with ThreadPoolExecutor(16) as pool:
                for index, reply in pool.map(ask, places):
                    assert reply == expected[index]
            refused = http.post(f"{urls[0]}/pause_generation", json={"mode": "retract"})
            assert refused.status_code == 400 and "abort or in_place" in refused.text
            assert ask((3, urls[0]))[1] == expected[3]
    finally:
        for process in processes:
            process.terminate()
