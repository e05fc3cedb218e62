#!/usr/bin/env bash
# Trains a real language model with GRPO on this machine, from nothing but Python and a package index.
#
#   bash scripts/quickstart.sh [extra train.py flags]
#
# What it runs is a plain train.py with the plain flags of examples/quickstart/args.sh; flags given here come last and
# win, for example `--num-rollout 10`, `--rollout-seed 7` or `--run-name mine`.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
set_up quickstart

DATA="$ROOT/.cache/quickstart"
"$VENV_PYTHON" examples/quickstart/prepare.py --out "$DATA"
set_up_wall_s=$SECONDS
times >"$DATA/times" # not in a subshell, which would have no children; the second line is theirs: 0m1.23s 0m0.45s
set_up_cpu_s="$(awk 'NR == 2 { gsub(/[ms]/, " "); print $1 * 60 + $2 + $3 * 60 + $4 }' "$DATA/times")"

# where the run writes: what is given last counts
RUN_NAME="quickstart-$(date +%Y%m%d-%H%M%S)"
OUTPUT_DIR=outputs
trains=1
previous=
for word in "$@"; do
  case "$previous" in --run-name) RUN_NAME="$word" ;; --output-dir) OUTPUT_DIR="$word" ;; esac
  case "$word" in
    --run-name=*) RUN_NAME="${word#*=}" ;;
    --output-dir=*) OUTPUT_DIR="${word#*=}" ;;
    --dry-run | --help | --help-all | -h) trains=0 ;;
  esac
  previous="$word"
done
RUN_DIR="$OUTPUT_DIR/$RUN_NAME"
source examples/quickstart/args.sh

if [ "$trains" = 0 ]; then exec "$VENV_PYTHON" train.py "${ARGS[@]}" "$@"; fi
say "training: see it live with .venv/bin/tensorboard --logdir outputs"
"$VENV_PYTHON" scripts/cpu_time.py --write "$RUN_DIR/cost.json" -- "$VENV_PYTHON" train.py "${ARGS[@]}" "$@"
"$VENV_PYTHON" examples/quickstart/report.py "$RUN_DIR" --set-up-wall-s "$set_up_wall_s" --set-up-cpu-s "$set_up_cpu_s"
