"""With this folder on PYTHONPATH each process calls itself a host of its own when it speaks to NCCL.

NCCL refuses two ranks on one GPU of one host; ranks that seem to be on two hosts it connects by sockets. So a machine
with one GPU can run everything that several ranks do, over NCCL, though not at a speed that says anything.
"""

import os

os.environ["NCCL_HOSTID"] = f"process-{os.getpid()}"
