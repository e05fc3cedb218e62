"""Functions that flags name are found in source and checked against the way they are called."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from slime.arguments.hooks import GENERATE, HOOKS, REWARD, check_hooks
from slime.arguments.source import find
from slime.config.errors import ConfigError
from slime.config.flags import default_of
from slime.config.groups import GROUPS
from slime.config.rules.algorithm import REWARDS


def hooks(**values: object) -> None:
    """Check hook flags, all others at their defaults."""
    defaults = {f.name: default_of(f) for group in GROUPS.values() for f in fields(group)}
    check_hooks(defaults | values)


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PYTHONPATH; its modules fail when imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise RuntimeError('imported')\n" + source)
    return path


GENERATE_FORMS = {
    "per sample": "async def fn(args, sample, sampling_params): ...",
    "per sample with evaluation": "async def fn(args, sample, sampling_params, evaluation=False): ...",
    "evaluation without a default": "async def fn(args, sample, sampling_params, evaluation): ...",
    "list": "async def fn(args, samples, evaluation=False): ...",
    "list without evaluation": "async def fn(args, samples): ...",
    "anything": "async def fn(*args, **kwargs): ...",
    "other names": "async def fn(a, s, params): ...",
    "a plain function that returns an awaitable": "def fn(args, sample, sampling_params): return other(args, sample)",
    "decorated by someone else": "@deco\nasync def fn(x): ...",
    "assigned": "fn = functools.partial(other, 1)",
    "conditional": "try:\n    import fast\nexcept ImportError:\n    async def fn(args, sample, sampling_params): ...",
    "traced": "@trace_function('x')\nasync def fn(args, sample, sampling_params): ...",
}


@pytest.mark.parametrize("form", GENERATE_FORMS)
@pytest.mark.parametrize("path", ["my_generate.fn", "my_generate.py:fn"])
def test_forms_of_a_generate_function_that_are_accepted(form: str, path: str, plugins: Path) -> None:
    write(plugins, "my_generate.py", GENERATE_FORMS[form])
    hooks(custom_generate_function_path=path)
    assert "my_generate" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("async def fn(args, sample): ...", "takes 2 arguments, but is called with 3"),
        ("async def fn(args, sample, sampling_params, tools): ...", "asks for tools"),
        ("async def fn(args, sample, sampling_params, *, tools): ...", "asks for tools"),
        ("async def fn(args, samples, tools): ...", "asks for tools"),
        ("def fn(args, sample, sampling_params): return 1.0", "async def fn"),
        ("class fn: ...", "is a class"),
    ],
)
def test_forms_of_a_generate_function_that_cannot_be_called(source: str, message: str, plugins: Path) -> None:
    write(plugins, "my_generate.py", source)
    with pytest.raises(ConfigError, match=f"--custom-generate-function-path my_generate.fn: .*{message}"):
        hooks(custom_generate_function_path="my_generate.fn")


def test_a_bare_file_means_the_conventional_name_then_its_own_then_the_only_one(plugins: Path) -> None:
    write(plugins, "a.py", "def helper(): ...\nasync def generate(args, sample, sampling_params): ...")
    write(plugins, "b.py", "def helper(): ...\nasync def b(args, sample, sampling_params): ...")
    write(plugins, "c.py", "def _helper(): ...\nasync def only(args, sample, sampling_params): ...")
    for name, expected in (("a", "generate"), ("b", "b"), ("c", "only")):
        found = find("--flag", f"{name}.py", ("custom_generate", "generate"))
        assert found.node is not None and found.node.name == expected


def test_what_a_bare_file_imports_is_meant_only_if_it_defines_nothing(plugins: Path) -> None:
    write(plugins, "base.py", "async def generate(args, sample, sampling_params): ...")
    write(plugins, "own.py", "from base import generate\nasync def mine(args, sample, sampling_params): ...")
    write(plugins, "again.py", "from base import generate")
    for name, expected in (("own", "own.py:mine"), ("again", "base.py:generate")):
        assert find("--flag", f"{name}.py", ("custom_generate", "generate")).where.startswith(expected)


def test_a_name_is_followed_to_where_it_is_defined(plugins: Path) -> None:
    write(plugins, "package/__init__.py", "from .inner import fn as reward")
    write(plugins, "package/inner.py", "from other_module import fn")
    write(plugins, "other_module.py", "async def fn(args, sample, level): ...")
    with pytest.raises(ConfigError, match=r"other_module.py:fn \(line 2\) .*asks for level"):
        hooks(custom_rm_path="package.reward")


def test_names_that_source_does_not_show_are_accepted(plugins: Path) -> None:
    write(plugins, "star.py", "from somewhere import *")
    write(plugins, "lazy.py", "def __getattr__(name): ...")
    for path in ("star.fn", "lazy.fn", "math.sqrt"):
        assert find("--flag", path).node is None


def test_a_circle_of_imports_ends(plugins: Path) -> None:
    write(plugins, "x.py", "from y import fn")
    write(plugins, "y.py", "from x import fn")
    assert find("--flag", "x.fn").node is None


REWARD_FORMS = {
    "single": "async def fn(args, sample, **kwargs): ...",
    "batch": "async def fn(args, samples): ...",
    "plain": "def fn(args, sample): return 1.0",
    "class": "class fn:\n    def __init__(self, path): ...\n    def compute_reward(self, prompts, responses): ...",
    "class without a model": "class fn:\n    def compute_reward(self, prompts, responses): ...",
    "class with a parent": "class fn(Base): ...",
}


@pytest.mark.parametrize("form", REWARD_FORMS)
def test_forms_of_a_reward_that_are_accepted(form: str, plugins: Path) -> None:
    write(plugins, "my_reward.py", REWARD_FORMS[form])
    hooks(custom_rm_path="my_reward.fn", rm_model_path="judge")


SOURCES = {
    "as documented": "class Mine:\n    def __init__(self, args): ...\n    def get_samples(self, num_samples): ...",
    "without args": "class Mine:\n    def __init__(self): ...\n    def get_samples(self, num_samples): ...",
    "subclass": "class Mine(RolloutDataSourceWithBuffer):\n    def buffer_filter(self, args, buffer, n): ...",
    "function": "def Mine(args): ...",
}


@pytest.mark.parametrize("form", SOURCES)
def test_forms_of_a_data_source_that_are_accepted(form: str, plugins: Path) -> None:
    write(plugins, "my_source.py", SOURCES[form])
    hooks(data_source_path="my_source.Mine")


def test_a_data_source_that_asks_for_more_is_refused(plugins: Path) -> None:
    write(
        plugins,
        "my_source.py",
        "class Mine:\n    def __init__(self, args, path): ...\n    def get_samples(self, n): ...",
    )
    with pytest.raises(ConfigError, match="slime passes `args` only"):
        hooks(data_source_path="my_source.Mine")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.dest)
def test_every_hook_accepts_its_documented_call_and_no_shorter_one(hook, plugins: Path) -> None:  # type: ignore[no-untyped-def]
    parameters = [*hook.positional, *hook.keywords]
    write(plugins, "right.py", f"def fn({', '.join(parameters)}): ...")
    write(plugins, "short.py", f"def fn({', '.join(parameters[:-1])}): ...")
    as_value = (lambda path: [path]) if hook.dest == "rollout_sample_hook_path" else (lambda path: path)
    hooks(**{hook.dest: as_value("right.fn")})
    with pytest.raises(ConfigError, match=hook.flag):
        hooks(**{hook.dest: as_value("short.fn")})


def test_a_sample_hook_may_be_async_and_take_what_it_likes(plugins: Path) -> None:
    write(plugins, "h.py", "async def a(args, sample): ...\ndef b(args, sample, *, rollout_id=None, evaluation): ...")
    hooks(rollout_sample_hook_path=["h.a", "h.b"])


def test_several_wrong_hooks_are_reported_together(plugins: Path) -> None:
    write(plugins, "h.py", "def f(): ...")
    with pytest.raises(ConfigError) as error:
        hooks(rollout_sample_hook_path=["h.f", "h.g"], custom_megatron_init_path="nowhere.f")
    assert len(error.value.messages) == 3


def test_names_of_a_bare_file_are_those_that_the_rollout_looks_for() -> None:
    from slime.rollout.rm_hub.custom import DEFAULT_NAMES
    from slime.rollout.sglang_rollout import GENERATE_NAMES

    assert REWARD.default_names == DEFAULT_NAMES
    assert GENERATE.default_names == GENERATE_NAMES


def test_every_built_in_reward_is_known_and_no_other() -> None:
    from slime.rollout.rm_hub.dispatch import GRADERS, REMOTE
    from slime.rollout.rm_hub.reasoning_gym_tasks import PREFIX

    assert set(REWARDS) == {*GRADERS, REMOTE, PREFIX.rstrip(":_/")}


def test_slimes_own_hooks_fit_their_flags() -> None:
    """The defaults are not checked at every start, so they are checked here."""
    hooks(rollout_function_path="slime.rollout.sleep_rollout.sleep")
    hooks(dynamic_sampling_filter_path="slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std")
    hooks(buffer_filter_path="slime.rollout.data_source.pop_first")
    for dest in ("rollout_function_path", "data_source_path"):
        default = next(default_of(f) for group in GROUPS.values() for f in fields(group) if f.name == dest)
        assert find(f"--{dest}", default).node is not None
