"""The thread that answers for a rank ends with its trainer."""

import subprocess
import sys

PROGRAM = """
from datetime import timedelta
from slime.backends.megatron.roll_call import RollCall
from slime.utils.processes import free_port
from slime.utils.rendezvous import tcp_store

port = free_port()
store = tcp_store("127.0.0.1", port, rank=0, world_size=1, timeout=timedelta(seconds=60))
roll_call = RollCall("127.0.0.1", port, rank=0, world_size=1)
roll_call.close()
print("thread alive:", roll_call._thread.is_alive(), flush=True)
"""


def test_a_process_that_has_closed_its_trainer_ends_in_order() -> None:
    """A thread that waits in torch while the interpreter ends would abort the process."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.stdout == "thread alive: False\n"
    assert done.returncode == 0, done.stderr
