"""The tables of other projects' flags and docs/flags.md are what their sources say."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("megatron", "router", "sglang")


def check(repository: Path, name: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/generate_flag_tables.py", "--check", "--only", name, *more],
        capture_output=True, text=True, cwd=repository, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_what_the_package_declares(name: str, repository: Path) -> None:
    """SGLang is not part of the base install; SLIME_SGLANG_SOURCE may name the folder of its package."""
    source = os.environ.get("SLIME_SGLANG_SOURCE") if name == "sglang" else None
    process = check(repository, name, *([f"--{name}-source", source] if source else []))
    if process.returncode == 3 and name == "sglang":
        pytest.skip(f"the table of SGLang's flags was not compared: {process.stderr.strip()}")
    assert process.returncode == 0, process.stderr


def test_a_changed_default_in_the_package_is_found(repository: Path, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("sglang_router")
    assert spec is not None and spec.origin is not None
    copy = tmp_path / "sglang_router"
    copy.mkdir()
    (copy / "__init__.py").touch()
    source = Path(spec.origin).with_name("router_args.py").read_text()
    (copy / "router_args.py").write_text(source.replace("cache_threshold: float = 0.3", "cache_threshold: float = 0.4"))
    process = check(repository, "router", "--router-source", str(copy))
    assert process.returncode == 1
    assert '+{"names": ["--router-cache-threshold"]' in process.stderr


def test_the_document_of_flags_is_up_to_date(repository: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "slime.arguments.docs", "--check"],
        capture_output=True, text=True, cwd=repository, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
