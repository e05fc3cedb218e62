"""Nothing that comes from outside may become code: no unpickling, no eval, no remote code, but for a reasoned few.

What is banned is found in the syntax tree, so a call is seen whatever its formatting; names reached by
`getattr` or `importlib` are not, which a reviewer would notice.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("slime", "slime_plugins", "tools", "benchmarks", "examples", "scripts", "train.py", "train_async.py")
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
BUILTINS = {"eval", "exec"}
CALLS = {
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.jit.load",
    "torch.hub.load",
    "pandas.read_pickle",
}
OBJECT_COLLECTIVES = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"}
OBJECT_COLLECTIVES |= {"send_object_list", "recv_object_list"}
MEGATRON_LOADERS = {"load", "load_plain_tensors", "load_common_state_dict"}
IMPLICIT_TRUST = "from_pretrained without trust_remote_code"
"""transformers' default is not to trust, but to ask on a terminal; programs that a person runs alone may leave it."""

_OWN_RANKS = (
    "torch pickles objects between ranks: processes of one run, that met on loopback where they are on one host"
)
_SAFE_LOADER = "reads with an unpickler that knows tensors and Megatron's own records alone, unless the user opts out"
_CHECKPOINT_FORMAT = "slime/backends/megatron/checkpoint_format.py"
ALLOWED = {
    ("slime/backends/megatron/parallel.py", "broadcast_object_list"): _OWN_RANKS,
    ("slime/backends/megatron/parallel.py", "all_gather_object"): _OWN_RANKS,
    ("slime/backends/megatron/weights.py", "all_gather_object"): _OWN_RANKS,
    ("slime/backends/megatron/checkpoint.py", "broadcast_object_list"): _OWN_RANKS,
    ("slime/backends/megatron/checkpoint.py", "all_gather_object"): _OWN_RANKS,
    ("slime/weight_sync/ipc.py", "broadcast_object_list"): _OWN_RANKS,
    ("slime/weight_sync/ipc.py", "gather_object"): _OWN_RANKS,
    ("slime/weight_sync/ipc.py", "pickle"): "only written here: an SGLang server takes a handle of GPU memory so alone",
    ("slime/backends/megatron/checkpoint.py", "dist_checkpointing.load"): "given the loaders of checkpoint_format.py",
    (_CHECKPOINT_FORMAT, "pickle"): _SAFE_LOADER,
    (_CHECKPOINT_FORMAT, "torch.load without weights_only=True"): "weights_only unless --allow-pickle-checkpoints",
}
"""(file, what) -> why it is harmless there. docs/security.md tells users of each."""


def findings(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of everything banned in a module."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in PICKLERS:
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _in_call(node, _dotted(node.func, names)))


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for: `np` is numpy, `load` may be torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _dotted(function: ast.expr, names: dict[str, str]) -> str:
    parts = []
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ".".join(["?", *reversed(parts)])
    return ".".join([names.get(function.id, function.id), *reversed(parts)])


def _in_call(node: ast.Call, name: str) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    last = name.rpartition(".")[2]
    if name in BUILTINS or name in {f"builtins.{banned}" for banned in BUILTINS} or name in CALLS:
        yield name
    if name in ("torch.load", "torch.serialization.load") and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if last == "from_pretrained" and name.split(".")[-2:-1] and name.split(".")[-2].startswith("Auto"):
        value = given.get("trust_remote_code")
        if value is None and None not in given:  # a ** may hold it
            yield IMPLICIT_TRUST
    if name == "yaml.load" and "Safe" not in ast.unparse(node):
        yield "yaml.load without a safe loader"
    if last in OBJECT_COLLECTIVES:
        yield last
    if "dist_checkpointing" in name and last in MEGATRON_LOADERS:
        yield f"dist_checkpointing.{last}"
    for argument, value in (("allow_pickle", True), ("shell", True), ("trust_remote_code", True)):
        if _is(given.get(argument), value):
            yield f"{argument}={value}"
    if _is(given.get("weights_only"), False):
        yield "weights_only=False"


def _is(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


def _programs(repository: Path) -> list[Path]:
    found = [repository / name for name in PROGRAMS if (repository / name).exists()]
    return sorted(file for path in found for file in ([path] if path.is_file() else path.rglob("*.py")))


def test_nothing_from_outside_is_unpickled_or_evaluated(repository: Path) -> None:
    files = _programs(repository)
    assert len(files) > 100
    found = [
        (f"{path.relative_to(repository)}", line, what)
        for path in files
        for line, what in findings(path.read_text(encoding="utf-8"))
    ]
    found = [entry for entry in found if entry[2] != IMPLICIT_TRUST or entry[0].startswith(("slime/", "tools/"))]
    banned = [f"{path}:{line}: {what}" for path, line, what in found if (path, what) not in ALLOWED]
    assert not banned
    there = {(path, what) for path, what in ALLOWED if (repository / path).exists()}
    unneeded = there - {(path, what) for path, _, what in found}
    assert not unneeded, "allowed, but no longer there"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load as read\nread(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "eval(text)",
        "import builtins\nbuiltins.exec(text)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import subprocess as sp\nsp.run(text, shell=True)",
        "from os import system\nsystem(text)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(path)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(path, trust_remote_code=True)",
        "import torch.distributed as dist\ndist.all_gather_object(them, mine)",
        "from megatron.core import dist_checkpointing\ndist_checkpointing.load(state, path)",
    ],
)
def test_each_way_to_run_input_as_code_is_seen(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "model.eval()",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.safe_load(text)",
        "from transformers import AutoConfig\nAutoConfig.from_pretrained(path, trust_remote_code=trusts)",
        "import subprocess\nsubprocess.run(words)",
    ],
)
def test_what_is_safe_is_not_banned(source: str) -> None:
    assert not list(findings(source))
