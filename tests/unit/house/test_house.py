"""The house keeps its rules: layers, style, types, generated documents."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slime.observability import metric_names

SHELL_SCRIPTS = ("scripts/*.sh", "scripts/*/*.sh", "examples/*/*.sh", ".ci/run")


def check(repository: Path, *command: str) -> None:
    """Runs a tool of this environment in the repository; its whole output is the failure's text."""
    done = subprocess.run([sys.executable, *command], cwd=repository, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def tracked_files(repository: Path) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [repository / name for name in listed.stdout.split("\0") if name and (repository / name).is_file()]


def imported_packages(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every absolute import below the folder, as (file, dotted name)."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield path, node.module


def test_a_room_imports_only_rooms_below_it(repository: Path) -> None:
    check(repository, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())")


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("losses", {"torch", "slime.losses"}),
        ("config", {"slime.config", "yaml", "_typeshed"}),
    ],
)
def test_a_pure_room_imports_nothing_else(repository: Path, room: str, allowed: set[str]) -> None:
    """`losses` knows torch; `config` the standard library, and yaml for the files that some flags name."""
    foreign = {
        f"{path.relative_to(repository)} imports {name}"
        for path, name in imported_packages(repository / "slime" / room)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == package or name.startswith(package + ".") for package in allowed)
    }
    assert not foreign


def test_reading_the_flags_loads_no_large_package(repository: Path) -> None:
    program = "import sys, slime.config, slime.arguments; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    large = {"torch", "ray", "transformers", "megatron", "numpy", "sglang"}
    assert not large & {name.split(".")[0] for name in done.stdout.split()}


def test_the_code_is_formatted(repository: Path) -> None:
    check(repository, "-m", "ruff", "format", "--check", "--diff", ".")


def test_the_code_has_no_lint(repository: Path) -> None:
    check(repository, "-m", "ruff", "check", ".")


def test_the_pure_rooms_are_strictly_typed(repository: Path) -> None:
    check(repository, "-m", "mypy")


def test_the_list_of_metrics_is_the_declared_one(repository: Path) -> None:
    written = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == metric_names.markdown(), "run: python -m slime.observability.metric_names docs/metrics.md"


def test_the_list_of_flags_is_the_real_one(repository: Path) -> None:
    check(repository, "-m", "slime.arguments.docs", "--check")


def test_every_module_says_what_it_is_for(repository: Path) -> None:
    folders = [
        repository / name for name in ("slime", "slime_plugins", "examples", "scripts") if (repository / name).is_dir()
    ]
    silent = [
        str(path.relative_to(repository))
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_every_shell_script_parses(repository: Path) -> None:
    scripts = [path for pattern in SHELL_SCRIPTS for path in sorted(repository.glob(pattern))]
    assert len(scripts) >= 4
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_nothing_of_one_persons_machine_is_in_the_repository(repository: Path) -> None:
    """Home folders and credentials; a path in a document is relative or begins with a variable."""
    private = re.compile(r"/home/\w+/|/root/|/Users/\w+/|-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z]{30,}\b")
    found = []
    for path in tracked_files(repository):
        if path.suffix in {".png", ".parquet", ".pt"} or path == Path(__file__):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [
            f"{path.relative_to(repository)}:{n}: {line[:100]}"
            for n, line in enumerate(lines, 1)
            if private.search(line)
        ]
    assert not found
