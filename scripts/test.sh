#!/usr/bin/env bash
# Runs slime's tests in .venv, which it makes and fills if it is not there.
#
#   bash scripts/test.sh                 unit, contract and gloo tests (at most 12 minutes on two cores)
#   bash scripts/test.sh -m e2e          runs of the whole stack
#   bash scripts/test.sh tests/unit -k packing     anything that pytest takes

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
set_up dev

exec "$VENV_PYTHON" -m pytest --durations 5 "$@"
