"""Kill (or stop) a run's processes at random moments, and compare what comes out with a run that was left in peace.

    python benchmarks/chaos.py [--kills 20] [--seed S] [--keep]
    python benchmarks/chaos.py --signal STOP [--no-fault-tolerance] [--targets ...] [--phases ...]

A tiny random model runs on two trainer ranks and two engines in deterministic mode: once undisturbed, then under
attack, started again by the same command line whenever an attack has ended it. Targets, phases and moments are drawn
from the seed, which is printed. Exits with 1 if the weights, metrics, samples or the ledger differ from the undisturbed
run's, an error names the wrong process, a process is left over, or a deadline was missed.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.chaos.attacks import STOPPED, STOPPED_PHASES, draw_kills, draw_stops  # noqa: E402
from tests.chaos.comparison import attack_and_compare, say_with_time  # noqa: E402


def main() -> int:
    """Draw, attack, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--kills", type=int, default=None, help="how many; default: 20, with STOP each pair once")
    parser.add_argument("--seed", type=int, default=None, help="of targets, phases and moments; default: the time")
    parser.add_argument("--targets", nargs="+", default=STOPPED, choices=STOPPED, help="what is stopped with STOP")
    parser.add_argument("--phases", nargs="+", default=STOPPED_PHASES, choices=STOPPED_PHASES, help="when, with STOP")
    parser.add_argument("--no-fault-tolerance", action="store_true", help="without --use-fault-tolerance")
    parser.add_argument("--liveness-timeout", type=float, default=None, help="seconds; default: 60, with STOP 15")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folder where it is")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    if options.signal == "KILL":
        attacks = draw_kills(options.kills or 20, seed)
    else:
        attacks = draw_stops(options.targets, options.phases, seed, options.kills)
    for attack in attacks:
        print(attack)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving in order ends the run under attack
    folder = Path(tempfile.mkdtemp(prefix="slime_chaos_"))
    say_with_time(f"seed {seed}, {len(attacks)} attacks, folder {folder}")
    started = time.monotonic()
    comparison = attack_and_compare(
        folder,
        attacks,
        is_fault_tolerant=not options.no_fault_tolerance,
        liveness_timeout_s=options.liveness_timeout or (60.0 if options.signal == "KILL" else 15.0),
        say=say_with_time,
    )
    print(f"\n{comparison}\n\nseed {seed}, {time.monotonic() - started:.0f} s")
    if options.keep or not comparison.is_right:
        print(f"runs left in {folder}")
    else:
        shutil.rmtree(folder)
    return 0 if comparison.is_right else 1


if __name__ == "__main__":
    sys.exit(main())
