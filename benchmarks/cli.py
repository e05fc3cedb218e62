"""How long train.py takes to answer: --help, --dry-run and each wrong command line of the tests, in real processes.

    python benchmarks/cli.py [--repeats 3] [--limit-s 1.0]

Prints the median wall and CPU time of each and the ratio to an empty Python process; exits 1 if one is over the limit.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.arguments.wrong_command_lines import (  # noqa: E402
    WRONG_COMMAND_LINES,
    make_files,
    right_command_line,
)


def median_s(argv: list[str], expected_code: int, repeats: int) -> tuple[float, float]:
    """Median wall and CPU time of a process, in seconds; every one must end with the expected code."""
    times, cpu_times = [], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), _children_cpu_s()
        process = subprocess.run(argv, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
        times.append(time.perf_counter() - start)
        cpu_times.append(_children_cpu_s() - cpu_start)
        if process.returncode != expected_code:
            raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}:\n{process.stderr}")
    return statistics.median(times), statistics.median(cpu_times)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        cases = [("--help", ["--help"], 0), ("--help-all", ["--help-all"], 0)]
        cases.append(("--dry-run", right_command_line(files, "--dry-run"), 0))
        cases += [(w.rule, w.command_line(files), 2) for w in WRONG_COMMAND_LINES if w.loop == "sync"]
        bare, bare_cpu = median_s([sys.executable, "-c", "pass"], 0, options.repeats)
        print(f"{'case':<52} {'wall ms':>8} {'x python':>9} {'cpu ms':>8}")
        print(f"{'python -c pass':<52} {bare * 1e3:>8.0f} {1:>9.1f} {bare_cpu * 1e3:>8.0f}")
        slowest = 0.0
        for name, words, code in cases:
            seconds, cpu = median_s([sys.executable, "train.py", *words], code, options.repeats)
            slowest = max(slowest, seconds)
            print(f"{name:<52} {seconds * 1e3:>8.0f} {seconds / bare:>9.1f} {cpu * 1e3:>8.0f}")
    print(f"slowest {slowest * 1e3:.0f} ms, limit {options.limit_s * 1e3:.0f} ms, {len(cases)} cases")
    return 1 if slowest > options.limit_s else 0


if __name__ == "__main__":
    sys.exit(main())
