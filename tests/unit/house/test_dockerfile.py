"""The Dockerfile copies files that are there, and its processes are not root's. (It is built where Docker is.)"""

import fnmatch
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def instructions(repository: Path) -> list[list[str]]:
    """Words of each instruction, continuation lines joined."""
    text = (repository / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def ignored(repository: Path, path: str) -> bool:
    """Whether .dockerignore leaves a path out, or a folder above it."""
    patterns = [line for line in (repository / ".dockerignore").read_text().split("\n") if line and line[0] != "#"]
    parts = Path(path).parts
    names = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(
        fnmatch.fnmatch(name, pattern) or (pattern.startswith("**/") and fnmatch.fnmatch(Path(name).name, pattern[3:]))
        for pattern in patterns
        for name in names
    )


def test_what_is_copied_is_there(repository: Path, instructions: list[list[str]]) -> None:
    copies = [[word for word in words[1:] if not word.startswith("--")] for words in instructions if words[0] == "COPY"]
    assert copies, "an image without slime"
    for *sources, _ in copies:
        for source in sources:
            assert (repository / source).exists(), f"COPY {source}: there is no such file"
            assert source == "." or not ignored(repository, source), f"COPY {source}: .dockerignore leaves it out"


def test_nothing_that_is_tracked_is_left_out_but_the_tests_of_changes(repository: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    left_out = [name for name in listed.stdout.splitlines() if ignored(repository, name)]
    assert [name for name in left_out if not name.startswith(".ci/")] == []


def test_its_processes_are_not_roots(instructions: list[list[str]]) -> None:
    users = [words[1] for words in instructions if words[0] == "USER"]
    assert users and users[-1] != "root"
    installs = [words for words in instructions if words[0] == "RUN" and "pip" in words]
    last_user = max(i for i, words in enumerate(instructions) if words[0] == "USER")
    assert all(instructions.index(words) > last_user for words in installs)


def test_it_installs_what_the_project_calls_the_gpu_path(instructions: list[list[str]]) -> None:
    (install,) = (words for words in instructions if words[:3] == ["RUN", "pip", "install"])
    assert install[-2:] == [".[gpu]", "sglang==${SGLANG}"]


def test_its_sglang_is_one_that_the_project_takes(repository: Path, instructions: list[list[str]]) -> None:
    (version,) = (words[1].removeprefix("SGLANG=") for words in instructions if words[1].startswith("SGLANG="))
    assert version in gpu_extra(repository)["sglang"].specifier


def test_a_job_can_be_submitted_with_it(repository: Path) -> None:
    """`ray job submit`, and the head's part of it, are in ray[default] alone."""
    assert gpu_extra(repository)["ray"].extras == {"default"}


def gpu_extra(repository: Path) -> dict[str, Requirement]:
    extra = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    return {requirement.name: requirement for requirement in map(Requirement, extra)}
