"""Processes and devices: the cluster, placement, actors, and what to do when one of them fails."""

import os

# Ray reads these when it is imported, which every module of this room may be the first to do.
# On one machine every socket of Ray belongs on loopback:
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# An actor that holds no device must still see what its environment says it sees:
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray starts workers with niceness 15, which on a machine with other work starves trainers and engines:
os.environ.setdefault("RAY_worker_niceness", "0")
