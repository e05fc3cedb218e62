"""Stands for train.py in the tests of the chaos harness: phases, a status file, children, a position to resume from.

    python fake_train.py FOLDER NUM_ROLLOUT [QUIRK ...]

QUIRK: `blames-the-router` names the wrong process; `leaves-a-child` starts one that outlives the run; `forgets` loses
a step when it resumes; `hangs` waits for ever for a trainer that has died.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PHASE_S = 0.12
folder, num_rollout, quirks = Path(sys.argv[1]), int(sys.argv[2]), set(sys.argv[3:])
SLEEPER = "import sys, time, os\nwhile os.getppid() == int(sys.argv[1]): time.sleep(0.02)"


def sleeper() -> "subprocess.Popen[bytes]":
    """A child that ends when this process is gone."""
    return subprocess.Popen([sys.executable, "-S", "-c", SLEEPER, str(os.getpid())])


def show(phase: str, rollout_id: int | None) -> None:
    processes = [{"name": "driver", "role": "driver", "pid": os.getpid(), "host": "h"}]
    processes += [{"name": name, "role": "x", "pid": child.pid, "host": "h"} for name, child in children.items()]
    status = {"phase": phase, "rollout_id": rollout_id, "since": round(time.time(), 3), "processes": processes}
    (folder / "status.partial").write_text(json.dumps(status))
    (folder / "status.partial").replace(folder / "status.json")


def check() -> None:
    """Engines are replaced; any other death ends the run."""
    for name, child in children.items():
        if child.poll() is None:
            continue
        if name.startswith("engine"):
            print(f"WARNING - {name} died; it is started again", flush=True)
            children[name] = sleeper()
        elif "hangs" in quirks:
            time.sleep(600)
        else:
            who = "router" if "blames-the-router" in quirks else name
            raise SystemExit(f"train.py: error: {who} died while rollout {rollout_id} was made; {name} is gone")


folder.mkdir(parents=True, exist_ok=True)
position = folder / "position"
first = int(position.read_text()) if position.exists() else 0
if first and "forgets" in quirks:
    first += 1
children = {name: sleeper() for name in ("actor rank 0", "rollout manager", "engine 0")}
if "leaves-a-child" in quirks:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
for rollout_id in range(first, num_rollout):
    for phase in ("generate", "train", "save", "sync"):
        show(phase, rollout_id)
        for _ in range(4):
            time.sleep(PHASE_S / 4)
            check()
        if phase == "save":
            with (folder / "metrics.jsonl").open("a") as log:
                log.write(json.dumps({"step": rollout_id, "train/loss": rollout_id / 8}) + "\n")
            position.write_text(str(rollout_id + 1))
