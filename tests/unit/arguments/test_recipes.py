"""Every recipe in scripts/run-*.sh is a test: --dry-run would accept it on the machine that it names."""

import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slime.arguments import parse_args
from slime.config import Machine
from slime.config.plan import Plan
from tests.unit.arguments.test_right_command_lines import published_model
from tests.unit.arguments.wrong_command_lines import make_rows

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "scripts").glob("run-*.sh"))


@dataclass(frozen=True)
class Wanted:
    """What a recipe is for."""

    gpus: int
    train: int
    """Trainer ranks."""
    engines: int
    colocate: bool = False
    loop: str = "sync"
    env: dict[str, str] = field(default_factory=dict)


WANTED: dict[str, list[Wanted]] = {
    "run-qwen2.5-0.5B-gsm8k": [
        Wanted(1, 1, 1, colocate=True),
        Wanted(2, 1, 1, env={"LAYOUT": "apart"}),
        Wanted(2, 1, 1, loop="async", env={"LAYOUT": "async"}),
    ],
    "run-qwen3-0.6B-1gpu": [Wanted(1, 1, 1, colocate=True)],
    "run-qwen3-1.7B-2gpus": [Wanted(2, 1, 1)],
    "run-qwen3-1.7B-2gpus-async": [Wanted(2, 1, 1, loop="async")],
    "run-qwen3-4B-8gpus": [Wanted(8, 8, 4, colocate=True)],
    "run-qwen3-8B-nodes": [
        Wanted(16, 16, 8, colocate=True),
        Wanted(16, 16, 8, colocate=True, env={"NUM_NODES": "4", "GPUS_PER_NODE": "4"}),
    ],
}
CASES = [(recipe, wanted) for recipe in RECIPES for wanted in WANTED.get(recipe.stem, [])]


def test_every_recipe_says_what_it_is_for() -> None:
    assert [recipe.stem for recipe in RECIPES if recipe.stem not in WANTED] == []


@pytest.mark.parametrize(
    ("recipe", "wanted"), CASES, ids=[f"{r.stem} {' '.join(w.env.values())}".strip() for r, w in CASES]
)
def test_a_recipe_runs_on_the_machine_that_it_names(
    recipe: Path, wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = launched(recipe, tmp_path, wanted.env)
    main = next(index for index, word in enumerate(command) if word.endswith(".py"))
    assert Path(command[main]).name == {"sync": "train.py", "async": "train_async.py"}[wanted.loop]
    assert (ROOT / Path(command[main]).name).is_file()
    for memory in (141 << 30, 80 << 30):  # an H200, an H100
        plan = planned(command[main + 1 :], wanted, memory, monkeypatch)
        assert plan.placement.devices_needed == wanted.gpus
        assert (plan.placement.world_size, plan.placement.num_engines) == (wanted.train, wanted.engines)
        assert (plan.placement.colocate, plan.engine.value) == (wanted.colocate, "sglang")
        assert plan.memory is not None and "hardly fit" not in plan.memory
        if "-nodes" in recipe.stem:
            assert plan.placement.actor_num_nodes == int(wanted.env.get("NUM_NODES", 2))


def test_the_plan_in_the_documents_is_the_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shortened there: every line that is shown is a line of the plan."""
    command = launched(ROOT / "scripts" / "run-qwen3-4B-8gpus.sh", tmp_path, {})
    text = planned(command[2:], Wanted(8, 8, 4), 141 << 30, monkeypatch).as_text()
    shown = (ROOT / "docs" / "placement.md").read_text().split("shortened:\n\n```\n")[1].split("```")[0]
    assert [line for line in shown.splitlines() if line not in text.splitlines()] == []


def test_a_recipe_for_several_nodes_is_a_job_that_ray_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned as the job is: on a node of the cluster that has neither GPUs nor SGLang."""
    from ray.dashboard.modules.job.cli import submit

    env = {"SLIME_DIR": str(ROOT), "RAY_ADDRESS": "http://head:8265"}
    command = launched(ROOT / "scripts" / "run-qwen3-8B-nodes.sh", tmp_path, env)
    assert command[1:3] == ["job", "submit"]
    given = submit.make_context("submit", command[3:]).params
    assert given["address"] == "http://head:8265"
    assert json.loads(given["runtime_env_json"])["env_vars"]["PYTHONPATH"] == str(ROOT)
    program, *words = given["entrypoint"][1:]
    assert Path(program) == ROOT / "train.py"
    machine = Machine(cores=16, joins_cluster=True)
    monkeypatch.setattr("slime.arguments.build.look_at_machine", lambda: machine)
    plan = parse_args(words).plan
    assert isinstance(plan, Plan)
    assert (plan.device.value, plan.engine.value, plan.placement.devices_needed) == ("cuda", "sglang", 16)


def test_flags_after_a_recipe_win(tmp_path: Path) -> None:
    command = launched(
        ROOT / "scripts" / "run-qwen3-0.6B-1gpu.sh", tmp_path, {}, "--lr", "3e-6", "--rollout-stop", "a b"
    )
    assert command[-4:] == ["--lr", "3e-6", "--rollout-stop", "a b"]


def test_a_recipe_that_lacks_its_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = launched(ROOT / "scripts" / "run-qwen3-0.6B-1gpu.sh", tmp_path, {"MODEL_DIR": "/no/such/model"})
    with pytest.raises(SystemExit) as stop:
        planned(command[2:], Wanted(1, 1, 1), 141 << 30, monkeypatch)
    assert stop.value.code == 2
    assert "--hf-checkpoint /no/such/model: there is no such folder" in capsys.readouterr().err


def launched(recipe: Path, folder: Path, env: dict[str, str], *extra: str) -> list[str]:
    """The command that a recipe starts, with a model of the published shape and a few rows of data."""
    (sourced,) = re.findall(r"^source scripts/models/(.+)\.sh$", recipe.read_text(), re.MULTILINE)
    model = published_model(folder / "models", sourced)
    data = folder / "data"
    rows: list[object] = [{"prompt": [{"role": "user", "content": "1 + 1 = ?"}], "label": "2"}]
    for name in ("train", "test", "dapo-math-17k/dapo-math-17k", "aime-2024/aime-2024"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        make_rows(data / f"{name}.jsonl", rows)
    for name in ("python3", "ray"):
        (folder / name).write_text("""#!/usr/bin/env bash\nprintf '%s\\0' "$0" "$@"\n""")
        (folder / name).chmod(0o755)
    paths = {"MODEL_DIR": str(model), "DATA_DIR": str(data), "MODEL": str(model), "DATA": str(data)}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHON", "RUN_NAME", "OUTPUT_DIR")}
    done = subprocess.run(
        ["bash", str(recipe), *extra], capture_output=True, text=True, check=True, cwd=folder,
        env={**inherited, "PATH": f"{folder}:{os.environ['PATH']}", **paths, **env},
    )  # fmt: skip
    return done.stdout.split("\0")[:-1]


def planned(words: list[str], wanted: Wanted, memory: int, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a command line on a machine with the GPUs that are wanted, all that is not built refused."""
    machine = Machine(cores=16 * wanted.gpus, num_gpus=wanted.gpus, gpu_memory_bytes=memory, has_sglang=True)
    monkeypatch.setattr("slime.arguments.build.look_at_machine", lambda: machine)
    plan = parse_args(words, loop="async" if wanted.loop == "async" else "sync").plan
    assert isinstance(plan, Plan)
    return plan
