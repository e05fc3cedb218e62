"""--dry-run prints the plan and starts nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slime.arguments import build_args
from slime.config import Machine
from tests.unit.arguments.wrong_command_lines import right_command_line

GOLDEN = """\
run
  name                model-grpo-20260101-120000
  model               {model} (Qwen3ForCausalLM, 4 layers, 0.2 M parameters)
  algorithm           grpo, KL loss k3 x 0.01, lr 1e-06
  device              cpu (--device cpu)
  devices             3 of 8 cpu devices, 2 cores
  dtype               fp32 (the CPU has neither avx512_bf16 nor amx_bf16)
  engine              embedded (no GPU)
  phases              generation and training take turns, each on its own devices
  parallel            tensor 1 x pipeline 1 x context 1 x data 2
processes
  driver              1
  rollout manager     1
  router              1
  engines (embedded)  1, 1 device each, 1 thread each
  trainer ranks       2, 1 device each, 1 thread each
batch
  a rollout           4 prompts x 8 = 32 samples
  training            2 optimizer steps of 16 samples for each rollout
  run                 3 rollouts, 6 optimizer steps in all
  evaluation          gsm, every 2 rollouts
paths
  run                 /project/outputs/model-grpo-20260101-120000
  starts from         {model} (--hf-checkpoint)
  reference           {model}
  checkpoints         /project/outputs/model-grpo-20260101-120000/checkpoints
notes
                      1 engine(s) with 1 thread leave 1 core(s) idle while generating; --rollout-num-gpus 2 uses all
                      --rollout-max-response-len: 1024 tokens where it is not given
"""


def test_the_plan_is_a_readable_table(files: dict[str, str], laptop: Machine) -> None:
    words = (
        "--use-kl-loss --kl-loss-coef 0.01 --kl-loss-type k3 --actor-num-gpus-per-node 2 --save-interval 2 "
        "--global-batch-size 16 --eval-interval 2 --eval-prompt-data gsm {data}"
    )
    args = build_args(right_command_line(files, words), machine=laptop)
    assert args.plan.as_text() + "\n" == GOLDEN.replace("{model}", files["model"])


def test_epochs_are_counted_once_the_prompts_are_read(files: dict[str, str], laptop: Machine) -> None:
    args = build_args(right_command_line(files, "--num-epoch 2", ("--num-rollout",)), machine=laptop)
    assert args.num_rollout is None
    assert "2 epochs (rollouts known once the prompts are read)" in args.plan.as_text()


def test_the_program_prints_the_plan_and_ends_well(files: dict[str, str], repository: Path, tmp_path: Path) -> None:
    """No folder is made, and nothing heavy is imported."""
    driver = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('IMPORTED', *sorted({'torch', 'ray', 'numpy', 'yaml'} & set(sys.modules))))\n"
        "from slime.arguments import parse_args\n"
        "parse_args()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", driver, *right_command_line(files, "--dry-run --save-interval 1")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert process.returncode == 0
    assert "  a rollout           4 prompts x 8 = 32 samples\n" in process.stdout
    assert process.stdout.splitlines()[-1] == "IMPORTED"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_shows_every_flag_of_slime(flag: str, repository: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from slime.arguments import parse_args; parse_args()", flag],
        capture_output=True, text=True, cwd=repository, check=True,
    )  # fmt: skip
    assert "  --rollout-batch-size N\n        Prompts in one rollout. Required.\n" in process.stdout
    assert "--sglang-mem-fraction-static" in process.stdout
    has_foreign_help = "The fraction of the memory used for static allocation" in process.stdout
    assert has_foreign_help is (flag == "--help-all")


@pytest.mark.parametrize(
    ("words", "phases", "engine"),
    [
        ("--debug-train-only", "training alone", "none is started"),
        ("--debug-rollout-only", "generation alone", "embedded (no GPU)"),
        ("--colocate", "generation and training take turns, on the same devices", "embedded (no GPU)"),
    ],
)
def test_the_plan_says_which_phases_there_are(
    words: str, phases: str, engine: str, files: dict[str, str], laptop: Machine
) -> None:
    text = build_args(right_command_line(files, words), machine=laptop).plan.as_text()
    assert f"  phases              {phases}\n" in text
    assert f"  engine              {engine}\n" in text
