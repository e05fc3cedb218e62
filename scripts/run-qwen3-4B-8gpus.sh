#!/usr/bin/env bash
# Qwen3-4B learns competition mathematics with GRPO on eight GPUs of one node, which trainer and engines share: the
# trainer as 4 data-parallel groups of 2 tensor-parallel ranks, four engines of two GPUs each.
#
#   hf download Qwen/Qwen3-4B --local-dir models/Qwen3-4B
#   hf download --repo-type dataset zhuzilin/dapo-math-17k --local-dir data/dapo-math-17k
#   hf download --repo-type dataset zhuzilin/aime-2024 --local-dir data/aime-2024
#   bash scripts/run-qwen3-4B-8gpus.sh [extra train.py flags, which win]
#
# MODEL_DIR, DATA_DIR, RUN_NAME and PYTHON in the environment replace what is below. The same RUN_NAME goes on from the
# run's last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/models/qwen3-4B.sh

MODEL_DIR="${MODEL_DIR:-models/Qwen3-4B}"
DATA_DIR="${DATA_DIR:-data}"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR"
  --run-name "${RUN_NAME:-qwen3-4B-8gpus}"
  --save-interval 20 --keep-last 2
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_DIR/dapo-math-17k/dapo-math-17k.jsonl" --input-key prompt --label-key label
  --apply-chat-template --rollout-shuffle
  --rm-type deepscaler
  --num-rollout 3000 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 8192 --rollout-temperature 1
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data aime "$DATA_DIR/aime-2024/aime-2024.jsonl"
  --n-samples-per-eval-prompt 16 --eval-max-response-len 16384 --eval-temperature 1
)
PERF_ARGS=(
  --colocate --actor-num-nodes 1 --actor-num-gpus-per-node 8
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

exec "${PYTHON:-python3}" train.py \
  "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" "${SGLANG_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
