"""Engines are asked to abort until they say that they are idle."""

import pytest

import slime.backends.sglang.server_control
import slime.backends.sglang_utils.server_control
from slime.utils.processes import free_port
from slime.utils.server_control import abort_server_until_idle, abort_servers_until_idle, num_requests_from_load


@pytest.mark.parametrize(
    ("load", "count"),
    [
        ({"loads": [{"num_reqs": 3}, {"num_reqs": 4}]}, 7),
        ({"loads": []}, 0),
        ([{"num_running_reqs": 1, "num_waiting_reqs": 2}], 3),
        ({"num_total_reqs": 5, "num_running_reqs": 1}, 5),
        ({"total_reqs": 0}, 0),
        ({"total_running_reqs": 2, "total_waiting_reqs": 0}, 2),
        ({"num_running_reqs": 2}, 2),
    ],
)
def test_requests_are_counted_in_every_known_shape_of_a_load(load, count):
    assert num_requests_from_load(load) == count


@pytest.mark.parametrize("load", [{"detail": "Not Found"}, "text", None, {"loads": [{}]}])
def test_a_load_without_a_count_is_an_error_that_shows_it(load):
    with pytest.raises(ValueError, match="/v1/loads"):
        num_requests_from_load(load)


def loads(*counts):
    return [(200, {"loads": [{"num_running_reqs": count, "num_waiting_reqs": 0}]}) for count in counts]


async def test_abort_is_asked_until_the_engine_is_idle(fake_engine):
    fake_engine.replies |= {"/abort_request": (200, ""), "/v1/loads": loads(5, 1, 0)}
    await abort_server_until_idle(fake_engine.url, interval_s=0.01)
    aborts = [payload for _, path, payload in fake_engine.asked if path == "/abort_request"]
    assert aborts == [{"abort_all": True}] * 3
    assert ("GET", "/v1/loads?include=core", None) in fake_engine.asked


async def test_an_engine_that_never_gets_idle_is_an_error_that_names_it(fake_engine):
    fake_engine.replies |= {"/abort_request": (200, ""), "/v1/loads": loads(2)}
    with pytest.raises(TimeoutError, match=rf"{fake_engine.url} still has 2 request\(s\) 0.2 s after"):
        await abort_server_until_idle(fake_engine.url, interval_s=0.05, timeout_s=0.2)


@pytest.mark.parametrize("reply", [(404, {"detail": "Not Found"}), (200, {"unknown": 1})])
async def test_an_engine_that_does_not_tell_its_load_ends_the_loop(fake_engine, reply, caplog):
    fake_engine.replies |= {"/abort_request": (200, ""), "/v1/loads": reply}
    await abort_server_until_idle(fake_engine.url)
    assert fake_engine.url in caplog.text


async def test_one_engine_that_is_gone_does_not_spare_the_others(fake_engine):
    fake_engine.replies |= {"/abort_request": (200, ""), "/v1/loads": loads(0)}
    await abort_servers_until_idle([f"http://127.0.0.1:{free_port()}", fake_engine.url], interval_s=0.01)
    assert ("POST", "/abort_request", {"abort_all": True}) in fake_engine.asked


def test_the_functions_are_found_where_plug_ins_import_them():
    for alias in (slime.backends.sglang.server_control, slime.backends.sglang_utils.server_control):
        assert alias.abort_servers_until_idle is abort_servers_until_idle
        assert alias.abort_server_until_idle is abort_server_until_idle
        assert alias.num_requests_from_load is num_requests_from_load
