#!/usr/bin/env bash
# Qwen3-8B learns competition mathematics with GRPO on several nodes of a Ray cluster, as a Ray job.
#
# On the head node, then on every other one (docs/placement.md has the details):
#   ray start --head --num-gpus 8 --disable-usage-stats
#   ray start --address HEAD:6379 --num-gpus 8 --disable-usage-stats
# Anywhere that reaches the head's dashboard (model and data as in run-qwen3-4B-8gpus.sh, under paths all nodes see):
#   RAY_ADDRESS=http://HEAD:8265 NUM_NODES=2 OUTPUT_DIR=/shared/outputs bash scripts/run-qwen3-8B-nodes.sh [extra flags]
#
# NUM_NODES, GPUS_PER_NODE (of each), MODEL_DIR, DATA_DIR, OUTPUT_DIR, RUN_NAME and PYTHON in the environment replace
# what is below. This repository has to lie at the same path on every node (SLIME_DIR, if that is another than here).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/models/qwen3-8B.sh

NUM_NODES="${NUM_NODES:-2}"
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"
SLIME_DIR="${SLIME_DIR:-$PWD}"
MODEL_DIR="${MODEL_DIR:-$SLIME_DIR/models/Qwen3-8B}"
DATA_DIR="${DATA_DIR:-$SLIME_DIR/data}"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR"
  --output-dir "${OUTPUT_DIR:-$SLIME_DIR/outputs}" --run-name "${RUN_NAME:-qwen3-8B-nodes}"
  --save-interval 20 --keep-last 2
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_DIR/dapo-math-17k/dapo-math-17k.jsonl" --input-key prompt --label-key label
  --apply-chat-template --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 3000 --rollout-batch-size 64 --n-samples-per-prompt 8 --global-batch-size 512
  --rollout-max-response-len 8192 --rollout-temperature 1
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$DATA_DIR/aime-2024/aime-2024.jsonl"
  --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-temperature 1
)
PERF_ARGS=(
  --device cuda # the driver's own node may have none
  --colocate --actor-num-nodes "$NUM_NODES" --actor-num-gpus-per-node "$GPUS_PER_NODE"
  --num-gpus-per-node "$GPUS_PER_NODE"
  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 1
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
  --use-dynamic-batch-size --max-tokens-per-gpu 9216
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
)
SGLANG_ARGS=(
  --rollout-num-gpus-per-engine 2
)
MISC_ARGS=(
  --use-fault-tolerance
)

# Environment of the driver and, through Ray, of every process of the run.
RUNTIME_ENV="{\"env_vars\": {\"PYTHONPATH\": \"$SLIME_DIR\", \"CUDA_DEVICE_MAX_CONNECTIONS\": \"1\"}}"

exec ray job submit --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" --runtime-env-json "$RUNTIME_ENV" \
  -- "${PYTHON:-python3}" "$SLIME_DIR/train.py" \
  "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" "${SGLANG_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
