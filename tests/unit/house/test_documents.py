"""Documents name only what is there: pages and headings, files, flags, metrics; and every page can be found."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from slime.arguments.parser import slime_flags, table_flags
from slime.observability import metric_names

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*/*.md")]
)
WRITTEN = [page for page in PAGES if page.name not in ("flags.md", "metrics.md")]
"""By hand; the others are generated."""

OTHER_FLAGS = {
    "docker": "build-arg env gpus ipc mount network rm tag ulimit user",
    "ray": "address dashboard-host disable-usage-stats head num-gpus resources runtime-env-json",
    "tensorboard": "logdir",
    "benchmarks/async_slow_samples.py": "train-s",  # it puts the names of its flags together
}
"""Program -> flags of it that documents show. Those of the repository's own programs are read from their source."""


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        if not other.exists() or (heading and heading not in headings(other)):
            broken.append(target)
    assert broken == []


def test_the_list_of_documents_has_every_page() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}


def flags_of_programs() -> set[str]:
    """Every `--word` that a program of the repository declares or looks for, and everything that train.py takes."""
    flags = [*slime_flags(), *(flag for flags in table_flags().values() for flag in flags)]
    known = {name for flag in flags for name in flag.names} | {"--help", "--help-all"}
    known |= {"--no-" + name.removeprefix("--") for flag in flags for name in flag.names}
    known |= {"--" + name.removeprefix("--sglang-") for name in known}  # where a server's own command line is shown
    known |= {"--" + word for words in OTHER_FLAGS.values() for word in words.split()}
    for folder in ("benchmarks", "examples", "scripts", "slime", "tests", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            known |= {
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--")
            }
    return known


def test_flags_in_documents_exist() -> None:
    known = flags_of_programs()
    unknown = {
        f"{page.relative_to(ROOT)}: {word}"
        for page in WRITTEN
        for word in re.findall(r"(?<![\w-])--[a-z](?:[\w-]*\w)?(?![\w*<-])", page.read_text(encoding="utf-8"))
        if word not in known
    }
    assert unknown == set()


def test_files_in_documents_are_there() -> None:
    """A path is one from the repository's root, from the page or, in prose about the code, from `slime/`."""
    missing = {
        f"{page.relative_to(ROOT)}: {path}"
        for page in WRITTEN
        for path in re.findall(
            r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|md|toml))(?::\w+)?`", page.read_text(encoding="utf-8")
        )
        if not any((folder / path).exists() for folder in (ROOT, ROOT / "slime", page.parent))
    }
    assert missing == set()


def test_metrics_in_documents_are_declared() -> None:
    """`perf/*_time` and `perf/<phase>_time` stand for any; a name that follows `/` alone continues the one before."""
    metrics = set()
    for page in WRITTEN:
        names = re.findall(r"`((?:rollout|train|perf|eval)/[\w/<>*]+)`", page.read_text(encoding="utf-8"))
        metrics |= {(page.name, name) for name in names if not re.search(r"\.\w+$", name)}
    assert len(metrics) > 20
    is_declared = {
        (page, name)
        for page, name in metrics
        if name.endswith("/*")
        or any(character in name for character in "*<")
        or metric_names.find(name) is not None
        or (ROOT / "slime" / name).exists()
    }
    assert metrics - is_declared == set()


def test_scripts_say_how_they_are_run() -> None:
    """Every shell script that is run begins with what it does, and stops at the first error."""
    listed = subprocess.run(["git", "ls-files", "scripts"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    scripts = [ROOT / name for name in listed.stdout.split() if name.endswith(".sh")]
    run = [path for path in scripts if path.read_text(encoding="utf-8").startswith("#!")]
    assert len(run) >= 9
    for path in run:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[1].startswith("# "), f"{path.name} does not say what it is for"
        assert "set -euo pipefail" in lines, f"{path.name} goes on after an error"
