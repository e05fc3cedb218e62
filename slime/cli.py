"""The `slime` console command: everything that is not training.

    slime report RUN_DIR                 what a run amounts to
    slime plot RUN_DIR ... --out PNG     its curves
    slime diff RUN_A RUN_B               where two runs first differ: step, sample, tensor
    slime ledger RUN_DIR                 whether each prompt was used exactly once
    slime flags [WORD ...]               which flags there are, searched by words
    slime doctor                         what is installed here and which path it allows

Each command imports what it needs when it runs, so that `slime doctor` works where something is missing.
"""

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

BASE_PACKAGES = ("torch", "megatron-core", "ray", "transformers", "sglang-router", "starlette", "httpx", "math-verify")
OPTIONAL_PACKAGES = {
    "sglang": "generates on GPUs: pip install -e '.[gpu]'",
    "reasoning-gym": "its tasks as rewards: pip install -e '.[reasoning]'",
    "wandb": "--use-wandb: pip install -e '.[wandb]'",
    "matplotlib": "slime plot: pip install -e '.[plot]'",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="slime", description="What is not training. Training is `python train.py`.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(commands, "report", report, "say what a run amounts to").add_argument("run_dir", type=Path)
    plotting = _add(commands, "plot", plot, "draw the curves of runs")
    plotting.add_argument("run_dirs", type=Path, nargs="+")
    plotting.add_argument("--out", type=Path, required=True, help="PNG file to write")
    comparing = _add(commands, "diff", diff, "say where two runs first differ: step, sample, metric and weight tensor")
    comparing.description = (
        "Compare the records of two runs step by step: prompts, samples, metrics (without times) and digests of the "
        "weights. Exit code 0: identical in all steps that both have; 1: different; 2: a folder is no run's."
    )
    comparing.add_argument("run_a", type=Path)
    comparing.add_argument("run_b", type=Path)
    comparing.add_argument("--json", action="store_true", help="print the comparison as JSON")
    ledger_parser = _add(commands, "ledger", ledger, "check that each prompt that was drawn is accounted for once")
    ledger_parser.add_argument("run_dir", type=Path)
    _add(commands, "flags", flags, "list or search train.py's flags").add_argument("words", nargs="*")
    _add(commands, "doctor", doctor, "say what is installed here and which path it allows")
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"slime: {error}", file=sys.stderr)
        return 1
    return code


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    command.set_defaults(run=run)
    return command


def report(args: argparse.Namespace) -> int:
    """Print the summary of a run."""
    from slime.observability.report import format_summary, summarise

    print(format_summary(summarise(args.run_dir)))
    return 0


def plot(args: argparse.Namespace) -> int:
    """Write the curves of runs as a PNG."""
    from slime.observability.report import plot_curves

    print(plot_curves(args.run_dirs, args.out))
    return 0


def diff(args: argparse.Namespace) -> int:
    """Print where two runs first differ; 0 if nowhere, 1 if somewhere, 2 if they cannot be compared."""
    from slime.observability.diff import compare_runs, format_comparison

    try:
        comparison = compare_runs(args.run_a, args.run_b)
    except (OSError, ValueError) as error:
        print(f"slime diff: {error}", file=sys.stderr)
        return 2
    names = str(args.run_a), str(args.run_b)
    print(comparison.to_json() if args.json else format_comparison(comparison, names))
    return 0 if comparison.is_identical else 1


def ledger(args: argparse.Namespace) -> int:
    """Check a run's ledger and print what it accounts for."""
    from slime.observability.ledger import check_ledger

    print(f"{args.run_dir}: {check_ledger(args.run_dir)}")
    return 0


def flags(args: argparse.Namespace) -> int:
    """Print the flags whose name or help has all the words; without words, how many there are and where they stand."""
    from slime.arguments.help_text import with_state
    from slime.arguments.parser import table_flags
    from slime.config.flags import with_help
    from slime.config.groups import GROUPS

    own = tuple(flag for group in GROUPS.values() for flag in with_help(group))
    tables = {"slime": own, **table_flags()}
    if not args.words:
        for name, found in tables.items():
            print(f"{len(found):5} flags of {name}")
        print("All of them with their defaults: docs/flags.md. To search: slime flags WORD [WORD ...]")
        return 0
    words = [word.lower() for word in args.words]
    num_found = 0
    for name, found in tables.items():
        for flag in found:
            text = f"{' '.join(flag.names)} {flag.help}"
            if all(word in text.lower() for word in words):
                num_found += 1
                text = with_state(" ".join(flag.help.split()), flag)
                print(f"{flag.names[0]}  ({name}, default {flag.default!r})\n    {text}")
    if not num_found:
        print(f"No flag has {' and '.join(args.words)} in its name or help.", file=sys.stderr)
    return 0 if num_found else 1


def doctor(args: argparse.Namespace) -> int:
    """Print what is installed, which device a run would use, and what is missing for it; 1 if it cannot run."""
    from slime.config.machine import look_at_machine

    print(f"Python {platform.python_version()} on {platform.platform()}")
    missing = [name for name in BASE_PACKAGES if not _print_version(name)]
    for name, purpose in OPTIONAL_PACKAGES.items():
        _print_version(name, purpose)
    machine = look_at_machine()
    print(f"  {machine.cores} cores, {machine.num_gpus} GPUs")
    if machine.num_gpus and machine.has_sglang:
        print("A run trains on the GPUs and generates with SGLang (--device cuda --rollout-engine sglang).")
    elif machine.num_gpus:
        print(
            "SGLang is missing, and without it a run on the GPUs is refused. Install it (pip install -e '.[gpu]'), set "
            "SLIME_SGLANG_PYTHON to an interpreter that has it, or give --device cpu."
        )
    else:
        print("A run trains on the CPU, and the embedded engine generates.")
        found = ", ".join(machine.cpu_instructions)
        print(f"bf16 on this CPU: {f'yes ({found})' if found else 'no, models run in fp32'}")
    if missing:
        print(f"Missing: {', '.join(missing)}. Install: pip install -e . (or bash scripts/quickstart.sh)")
    return 1 if missing or (machine.num_gpus and not machine.has_sglang) else 0


def _print_version(package: str, purpose: str = "") -> bool:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"  {package:15} not installed{'  (' + purpose + ')' if purpose else ''}")
        return False
    print(f"  {package:15} {version}")
    return True


if __name__ == "__main__":
    sys.exit(main())
