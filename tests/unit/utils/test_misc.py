"""Loading functions by every spelling, singletons, ports, periods, groups and chunks."""

import base64
import socket
import sys

import pytest
import torch

from slime.utils import misc
from slime.utils.misc import load_function


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return tmp_path


def write(folder, name, text):
    file = folder / name
    file.write_text(text)
    return str(file)


def test_a_dotted_path_and_a_file_with_a_name_give_the_function(folder):
    assert load_function("slime.utils.misc.load_function") is load_function
    file = write(folder, "my_plugin_a.py", "def one(): return 1\ndef two(): return 2\n")
    assert load_function(f"{file}:two")() == 2
    assert load_function(f"{file}:two") is load_function(f"{file}:two")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("def wanted(): return 'wanted'\ndef my_plugin_b(): return 'stem'\n", "wanted"),
        ("def second(): return 'second'\ndef my_plugin_b(): return 'stem'\n", "second"),
        ("def other(): return 'other'\ndef my_plugin_b(): return 'stem'\n", "stem"),
        ("from os.path import join\ndef only(): return 'only'\ndef _helper(): pass\n", "only"),
        ("from os.path import join as wanted\ndef only(): return 'only'\n", "only"),
        ("def only(): return 'only'\nwanted = lambda: 'assigned'\n", "assigned"),
        ("from os import getcwd as wanted\nimport functools\nsecond = functools.partial(str, 'partial')\n", "partial"),
    ],
)
def test_a_bare_file_is_searched_by_the_flags_names_then_its_own(folder, text, result):
    file = write(folder, "my_plugin_b.py", text)
    assert load_function(file, ("wanted", "second"))() == result


def test_a_bare_file_with_two_functions_asks_which(folder):
    file = write(folder, "my_plugin_c.py", "def one(): pass\ndef two(): pass\n")
    with pytest.raises(ValueError, match=r"one, two.*my_plugin_c.py:name.*reward"):
        load_function(file, "reward")


def test_errors_name_what_is_missing(folder):
    file = write(folder, "my_plugin_d.py", "def one(): pass\n")
    with pytest.raises(ImportError, match=r"has no 'two'. It defines one"):
        load_function(f"{file}:two")
    with pytest.raises(ImportError, match="no file"):
        load_function(str(folder / "absent.py"))
    with pytest.raises(ValueError, match="names no function"):
        load_function("nodots")
    with pytest.raises(ImportError):
        load_function("no_such_module_anywhere.fn")


def test_a_file_finds_its_neighbours_and_is_one_module_however_it_is_named(folder):
    write(folder, "my_neighbour.py", "VALUE = 5\n")
    file = write(folder, "my_plugin_e.py", "from my_neighbour import VALUE\ndef fn(): return VALUE\n")
    assert load_function(f"{file}:fn")() == 5
    assert load_function("my_plugin_e.fn") is load_function(f"{file}:fn")


def test_files_of_the_same_name_do_not_meet(folder):
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    first = write(folder / "a", "my_plugin_f.py", "def fn(): return 'a'\n")
    second = write(folder / "b", "my_plugin_f.py", "def fn(): return 'b'\n")
    assert (load_function(f"{first}:fn")(), load_function(f"{second}:fn")()) == ("a", "b")


def test_a_singleton_ignores_later_arguments_until_it_is_cleared():
    class One(metaclass=misc.SingletonMeta):
        def __init__(self, value):
            self.value = value

    class Other(One):
        pass

    kept = dict(misc.SingletonMeta._instances)
    try:
        assert One(1) is One(2)
        assert Other(3).value == 3
        One.clear_instances()
        assert One(4).value == 4
    finally:
        misc.SingletonMeta._instances.clear()
        misc.SingletonMeta._instances.update(kept)


@pytest.mark.parametrize(
    ("rollout_id", "interval", "per_epoch", "num_rollout", "due"),
    [
        (0, None, None, 1, False),
        (0, 2, None, None, False),
        (1, 2, None, None, True),
        (2, 10, 3, None, True),
        (4, 10, None, 5, True),
        (3, 10, None, 5, False),
    ],
)
def test_a_period_ends_at_its_interval_the_epoch_and_the_last_rollout(
    rollout_id, interval, per_epoch, num_rollout, due
):
    assert misc.should_run_periodic_action(rollout_id, interval, per_epoch, num_rollout) is due


def test_a_free_port_is_one_that_nothing_listens_on():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert misc.get_free_port(port) > port
        if port > 10001:
            first = misc.get_free_port(port - 1, consecutive=2)
            assert port not in (first, first + 1)


def test_groups_keep_the_order_of_first_appearance():
    assert misc.group_by(["bb", "a", "cc"], len) == {2: ["bb", "cc"], 1: ["a"]}
    assert misc.group_by([1, 2, 1]) == {1: [1, 1], 2: [2]}


def test_chunks_hold_at_most_the_given_bytes_and_a_larger_tensor_is_alone():
    params = [("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(9)), ("d", torch.zeros(1))]
    chunks = [[name for name, _ in chunk] for chunk in misc.chunk_named_params_by_size(params, 16)]
    assert chunks == [["a", "b"], ["c"], ["d"]]


@pytest.mark.parametrize("form", ["text", "bytes", "tensor", "array", "list"])
def test_int32_arrays_are_read_in_every_form_that_engines_send(form):
    tensor = torch.tensor([1, -2, 2**31 - 1], dtype=torch.int32)
    raw = tensor.numpy().tobytes()
    forms = {
        "text": base64.b64encode(raw).decode(),
        "bytes": raw,
        "tensor": tensor,
        "array": tensor.numpy(),
        "list": tensor.tolist(),
    }
    decoded = misc.decode_int32_meta_array({"b": forms[form]}, ("a", "b"))
    assert decoded.dtype == torch.int32
    assert decoded.tolist() == tensor.tolist()


def test_int32_arrays_may_be_absent_but_not_torn():
    assert misc.decode_int32_meta_array({"b": None}, ("a", "b")) is None
    assert misc.decode_int32_meta_array({"a": b""}, "a").tolist() == []
    with pytest.raises(ValueError, match="5 bytes"):
        misc.decode_int32_meta_array({"a": b"12345"}, "a")


def test_commands_report_their_output_and_their_failure():
    assert misc.exec_command("echo $((1 + 2))", capture_output=True) == "3\n"
    with pytest.raises(Exception, match="exit status 3"):
        misc.exec_command("exit 3")


def test_seeds_differ_by_each_part_and_fit_31_bits():
    seeds = {misc.sampling_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert misc.sampling_seed(42, 0) == misc.sampling_seed(42, 0) == 1723032787
