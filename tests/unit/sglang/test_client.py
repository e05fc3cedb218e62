"""Every call to an engine is the right request, and every failure names the engine, the call and the reply."""

import contextlib
import re
import socket
import threading
import time

import pytest

from slime.backends.base import EngineClient
from slime.backends.sglang.client import SGLangClient
from slime.utils.processes import free_port
from slime.weight_sync.base import EngineError

OK = (200, {"success": True, "message": "ok"})


@pytest.fixture
def client(fake_engine):
    client = SGLangClient(fake_engine.url, name="engine 7", timeout_s=2.0)
    yield client
    client.close()


def test_it_is_what_the_framework_calls_an_engine_client(client):
    assert isinstance(client, EngineClient)


@pytest.mark.parametrize(
    ("call", "path", "payload"),
    [
        (lambda c: c.pause(), "/pause_generation", {"mode": "abort"}),
        (lambda c: c.pause("retract"), "/pause_generation", {"mode": "retract"}),
        (lambda c: c.resume(), "/continue_generation", {}),
        (lambda c: c.flush_cache(), "/flush_cache", None),
        (lambda c: c.abort(), "/abort_request", {"abort_all": True}),
        (lambda c: c.abort("r1"), "/abort_request", {"rid": "r1"}),
        (
            lambda c: c.warm_up({"top_p": 0.9}),
            "/generate",
            {"input_ids": [1], "sampling_params": {"top_p": 0.9, "max_new_tokens": 1}},
        ),
        (lambda c: c.resume_memory(("weights",)), "/resume_memory_occupation", {"tags": ["weights"]}),
        (
            lambda c: c.update_weights_from_disk("/w", "3"),
            "/update_weights_from_disk",
            {"model_path": "/w", "weight_version": "3", "flush_cache": False},
        ),
        (lambda c: c.update_weights_from_shared_memory({}), "/update_weights_from_shared_memory", {}),
        (
            lambda c: c.update_weights_from_distributed(
                names=("a",), dtypes=("bfloat16",), shapes=((2, 3),), group_name="g", weight_version="3"
            ),
            "/update_weights_from_distributed",
            {
                "names": ["a"],
                "dtypes": ["bfloat16"],
                "shapes": [[2, 3]],
                "group_name": "g",
                "load_format": "flattened_bucket",
                "flush_cache": False,
                "weight_version": "3",
            },
        ),
        (
            lambda c: c.update_weights_from_tensor(("rank 0", "rank 1")),
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": ["rank 0", "rank 1"],
                "load_format": "flattened_bucket",
                "flush_cache": False,
            },
        ),
        (
            lambda c: c.set_weight_version("3"),
            "/update_weight_version",
            {"new_version": "3", "abort_all_requests": False},
        ),
        (lambda c: c.destroy_weights_update_group("g"), "/destroy_weights_update_group", {"group_name": "g"}),
        (lambda c: c.begin_weight_update(), "/begin_weight_update", {}),
        (lambda c: c.end_weight_update(), "/end_weight_update", {}),
    ],
)  # fmt: skip
def test_a_call_is_one_post(fake_engine, client, call, path, payload):
    fake_engine.replies[path] = OK
    call(client)
    assert fake_engine.asked == [("POST", path, payload)]


def test_the_digests_of_one_rank_keep_their_names(fake_engine, client):
    fake_engine.replies["/weights_checker"] = (200, {"success": True, "ranks": [{"checksums": {"w": "ab"}}]})
    assert client.checksums() == {"w": "ab"}
    assert fake_engine.asked[0][2] == {"action": "checksum"}


def test_the_digests_of_several_ranks_are_told_apart(fake_engine, client):
    ranks = [{"checksums": {"w": "ab"}}, {"checksums": {"w": "cd"}}]
    fake_engine.replies["/weights_checker"] = (200, {"success": True, "ranks": ranks})
    assert client.checksums() == {"tp0:w": "ab", "tp1:w": "cd"}


def test_digests_that_are_not_there_are_an_error(fake_engine, client):
    fake_engine.replies["/weights_checker"] = (200, {"success": True, "message": "Success."})
    with pytest.raises(EngineError, match=r"engine 7 .*POST /weights_checker: 200 without ranks"):
        client.checksums()


def test_requests_are_counted_over_ranks(fake_engine, client):
    ranks = [{"num_running_reqs": 2, "num_waiting_reqs": 1}, {"num_running_reqs": 0, "num_waiting_reqs": 4}]
    fake_engine.replies["/v1/loads"] = (200, {"loads": ranks})
    assert client.num_requests() == 7


def test_room_for_tokens_is_what_server_info_says(fake_engine, client):
    fake_engine.replies["/server_info"] = (200, {"max_total_num_tokens": 20000, "internal_states": [{}]})
    assert client.cache_tokens() == 20000
    fake_engine.replies["/server_info"] = (200, {})
    with pytest.raises(EngineError, match=r"engine 7 .*GET /server_info: 200 without max_total_num_tokens"):
        client.cache_tokens()


def test_the_version_is_what_model_info_says(fake_engine, client):
    fake_engine.replies["/model_info"] = (200, {"weight_version": "12"})
    assert client.weight_version() == "12"


def test_a_refusal_names_engine_url_call_status_and_reply(fake_engine, client):
    fake_engine.replies["/update_weights_from_disk"] = (400, {"success": False, "message": "no such folder"})
    with pytest.raises(EngineError) as caught:
        client.update_weights_from_disk("/nowhere", "3")
    for words in ("engine 7", fake_engine.url, "POST /update_weights_from_disk", "400", "no such folder"):
        assert words in str(caught.value)


def test_success_false_is_an_error_even_with_status_200(fake_engine, client):
    fake_engine.replies["/update_weight_version"] = (200, {"success": False, "message": "busy"})
    with pytest.raises(EngineError, match="busy"):
        client.set_weight_version("3")


def test_a_reply_that_is_no_json_is_an_error(fake_engine, client):
    fake_engine.replies["/model_info"] = (200, "<html>")
    with pytest.raises(EngineError, match="not JSON"):
        client.weight_version()


def test_silence_is_an_error_after_the_timeout(fake_engine):
    fake_engine.delay_s = 30.0
    client = SGLangClient(fake_engine.url, name="engine 7", timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"engine 7 .*POST /continue_generation: no answer within 0\.\d s"):
        client.resume()
    assert time.monotonic() - started < 10


def test_nobody_listening_is_an_error_but_only_means_unhealthy():
    client = SGLangClient(f"http://127.0.0.1:{free_port()}", name="engine 7", timeout_s=2.0)
    assert client.health() is False
    with pytest.raises(EngineError, match=r"engine 7 .*no connection"):
        client.server_info()


def test_health_is_the_status_of_the_health_page(fake_engine, client):
    fake_engine.replies["/health"] = [(503, ""), (200, "")]
    assert [client.health(), client.health()] == [False, True]


def test_a_flush_is_asked_again_while_aborted_requests_are_cleared(fake_engine, client):
    fake_engine.replies["/flush_cache"] = [
        (400, "Flush cache failed."),
        (400, "Flush cache failed."),
        (200, "Cache flushed."),
    ]
    client.flush_cache()
    assert len(fake_engine.asked) == 3


def test_a_busy_engine_may_keep_its_cache_if_that_was_said(fake_engine, client):
    fake_engine.replies["/flush_cache"] = [(400, "pending requests"), (200, "Cache flushed."), (500, "broken")]
    client.flush_cache(only_if_idle=True)
    assert len(fake_engine.asked) == 1
    client.flush_cache(only_if_idle=True)
    with pytest.raises(EngineError, match=r"POST /flush_cache: 500 broken"):
        client.flush_cache(only_if_idle=True)


@pytest.mark.parametrize(("tags", "payload"), [(None, {}), (["kv_cache"], {"tags": ["kv_cache"]})])
def test_memory_is_given_back_only_once_the_engine_is_idle(fake_engine, client, tags, payload):
    """A server that is asked sooner ends: its last reply goes out a step before it has nothing to do."""
    fake_engine.replies |= {"/flush_cache": [(400, "pending requests"), OK], "/release_memory_occupation": OK}
    client.release_memory(tags)
    assert [(path, body) for _, path, body in fake_engine.asked] == [
        ("/flush_cache", None),
        ("/flush_cache", None),
        ("/release_memory_occupation", payload),
    ]


def test_an_engine_that_stays_busy_is_not_asked_for_its_memory(fake_engine):
    fake_engine.replies["/flush_cache"] = (400, "Flush cache failed.")
    with pytest.raises(EngineError, match=r"POST /flush_cache: 400 Flush cache failed"):
        SGLangClient(fake_engine.url, name="engine 7", timeout_s=0.5).release_memory()
    assert {path for _, path, _ in fake_engine.asked} == {"/flush_cache"}


def test_a_flush_that_never_succeeds_is_an_error(fake_engine):
    fake_engine.replies["/flush_cache"] = (400, "Flush cache failed.")
    with pytest.raises(EngineError, match=r"POST /flush_cache: 400 Flush cache failed"):
        SGLangClient(fake_engine.url, name="engine 7", timeout_s=0.5).flush_cache()


def test_a_group_that_is_not_there_is_left_already(fake_engine, client):
    reply = {"success": False, "message": "The group to be destroyed does not exist."}
    fake_engine.replies["/destroy_weights_update_group"] = [(400, reply), (400, {"success": False, "message": "stuck"})]
    client.destroy_weights_update_group("g")
    with pytest.raises(EngineError, match="stuck"):
        client.destroy_weights_update_group("g")


def test_an_engine_without_weight_sessions_needs_none(client):
    client.begin_weight_update()
    client.end_weight_update()


def test_an_older_engine_with_two_keys_has_no_sessions_either(fake_engine, monkeypatch):
    """SGLang asks for the admin's key on its own paths of control alone; on others, unknown ones too, for the run's."""
    monkeypatch.setenv("SLIME_API_KEY", "key")
    monkeypatch.setenv("SLIME_ADMIN_API_KEY", "admin")
    unauthorized, unknown = (401, {"error": "Unauthorized"}), (404, {"detail": "Not Found"})
    fake_engine.replies |= {"/begin_weight_update": [unauthorized, unknown], "/continue_generation": OK}
    client = SGLangClient(fake_engine.url, name="engine 7")
    client.begin_weight_update()
    client.resume()
    assert [headers["authorization"] for headers in fake_engine.headers] == [
        "Bearer admin",
        "Bearer key",
        "Bearer admin",
    ]


def test_keys_that_an_engine_does_not_know_are_an_error(fake_engine, monkeypatch):
    monkeypatch.setenv("SLIME_API_KEY", "key")
    monkeypatch.setenv("SLIME_ADMIN_API_KEY", "admin")
    fake_engine.replies["/continue_generation"] = (401, {"error": "Unauthorized"})
    with pytest.raises(EngineError, match=r"engine 7 .*POST /continue_generation: 401 .*Unauthorized"):
        SGLangClient(fake_engine.url, name="engine 7").resume()


def test_a_session_left_open_by_a_failed_sync_is_closed_first(fake_engine, client):
    open_already = (
        400,
        {"success": False, "message": "a weight-update session is already open; call end_weight_update()"},
    )
    fake_engine.replies |= {"/begin_weight_update": [open_already, OK], "/end_weight_update": OK}
    client.begin_weight_update()
    assert [path for _, path, _ in fake_engine.asked] == [
        "/begin_weight_update",
        "/end_weight_update",
        "/begin_weight_update",
    ]


def test_the_api_key_is_a_bearer_token(fake_engine):
    fake_engine.replies["/continue_generation"] = OK
    SGLangClient(fake_engine.url, name="engine 7", api_key="secret").resume()
    assert fake_engine.headers[0]["authorization"] == "Bearer secret"


def test_a_proxy_of_the_environment_is_not_used(fake_engine, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    fake_engine.replies["/continue_generation"] = OK
    SGLangClient(fake_engine.url, name="engine 7").resume()
    assert len(fake_engine.asked) == 1


def test_a_connection_that_was_idle_is_not_trusted_with_a_request(monkeypatch):
    """This server drops a connection under its second request, as one does whose patience with idle ones just ended."""
    listener = socket.create_server(("127.0.0.1", 0))

    def read_request(connection: socket.socket) -> None:
        """Head and body, which may come apart."""
        data = b""
        while part := connection.recv(65536):
            head, end, body = (data := data + part).partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and len(body) >= (int(length[1]) if length else 0):
                return

    def serve_one_request(connection: socket.socket) -> None:
        with connection:
            read_request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            connection.recv(65536)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve_one_request, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()

    def client(keepalive_s: float) -> SGLangClient:
        monkeypatch.setattr("slime.backends.sglang.client._KEEPALIVE_S", keepalive_s)
        return SGLangClient(f"http://127.0.0.1:{listener.getsockname()[1]}", name="engine 7", timeout_s=5.0)

    careful, trusting = client(0.05), client(60.0)
    try:
        careful.resume()
        time.sleep(0.2)
        careful.resume()
        trusting.resume()
        with pytest.raises(EngineError, match="no connection"):
            trusting.resume()
    finally:
        careful.close()
        trusting.close()
        listener.close()
