"""What an engine tells about itself: what routers, monitors and the framework ask for."""

import time

from tests.contracts.engine.speaking import LONG, Engine, Reference


def test_health_is_an_empty_200(engine: Engine):
    for path in ("/health", "/health_generate"):
        reply = engine.http.get(path)
        assert (reply.status_code, reply.text) == (200, "")


def test_the_model_is_listed_with_its_context_length(engine: Engine):
    listing = engine.http.get("/v1/models").json()
    (model,) = listing["data"]
    assert listing["object"] == "list" and model["object"] == "model"
    assert model["id"] and model["max_model_len"] > 1000


def test_model_info_names_folder_version_and_type(engine: Engine):
    for path in ("/model_info", "/get_model_info"):
        info = engine.http.get(path).json()
        assert info["model_path"]
        assert isinstance(info["weight_version"], str)
        assert info["is_generation"] is True
        assert info["tokenizer_path"]


def test_server_info_tells_how_it_was_started(engine: Engine):
    for path in ("/server_info", "/get_server_info"):
        info = engine.http.get(path).json()
        assert info["tp_size"] == 1 and info["pp_size"] == 1
        assert info["dtype"] in ("float32", "bfloat16", "float16", "auto")
        assert info["max_total_num_tokens"] > 0
        assert info["version"]


def test_load_counts_requests_in_flight(engine: Engine, reference: Reference):
    assert engine.num_requests() == 0
    streams = [
        engine.stream(
            {"input_ids": reference.encode("The"), "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True}}
        )
        for _ in range(2)
    ]
    for stream in streams:
        stream.wait_for_events(2)
    load = engine.http.get("/v1/loads", params={"include": "core"}).json()
    (rank,) = load["loads"]
    assert rank["num_running_reqs"] + rank["num_waiting_reqs"] == 2
    assert rank["max_total_num_tokens"] > 0 and rank["num_used_tokens"] > 0
    engine.ok("/abort_request", {"abort_all": True})
    for stream in streams:
        stream.finish()
    deadline = time.monotonic() + 10
    while engine.num_requests() > 0:
        assert time.monotonic() < deadline, "the load still counts requests that were answered"
        time.sleep(0.05)
