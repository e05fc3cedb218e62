#!/usr/bin/env bash
# Qwen3-1.7B learns GSM8K with GRPO on two GPUs apart: one trains, the other generates, one after the other.
#
#   hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B
#   python examples/gsm8k/prepare.py --out data/gsm8k
#   bash scripts/run-qwen3-1.7B-2gpus.sh [extra train.py flags, which win]
#
# MODEL_DIR, DATA_DIR, RUN_NAME and PYTHON in the environment replace what is below. The same RUN_NAME goes on from the
# run's last checkpoint. run-qwen3-1.7B-2gpus-async.sh lets both work at the same time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/models/qwen3-1.7B.sh

MODEL_DIR="${MODEL_DIR:-models/Qwen3-1.7B}"
DATA_DIR="${DATA_DIR:-data/gsm8k}"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL_DIR"
  --run-name "${RUN_NAME:-qwen3-1.7B-2gpus}"
  --save-interval 20 --keep-last 1
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA_DIR/train.jsonl" --input-key prompt --label-key label --rollout-shuffle
  --apply-chat-template --apply-chat-template-kwargs '{"enable_thinking":false}'
  --rm-type math
  --num-rollout 200 --rollout-batch-size 32 --n-samples-per-prompt 8 --global-batch-size 256
  --rollout-max-response-len 1024 --rollout-temperature 1
)
EVAL_ARGS=(
  --eval-interval 20 --eval-prompt-data gsm8k_test "$DATA_DIR/test.jsonl"
  --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 1024
)
PERF_ARGS=(
  --actor-num-nodes 1 --actor-num-gpus-per-node 1 --rollout-num-gpus 1 --num-gpus-per-node 2
  --use-dynamic-batch-size --max-tokens-per-gpu 8192
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 1e-6 --lr-decay-style constant --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.98
)
SGLANG_ARGS=(
  --rollout-num-gpus-per-engine 1
  --sglang-mem-fraction-static 0.8 --sglang-cuda-graph-max-bs-decode 256
)
MISC_ARGS=(
  --use-fault-tolerance
)

exec "${PYTHON:-python3}" train.py \
  "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${PERF_ARGS[@]}" "${GRPO_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" "${SGLANG_ARGS[@]}" "${MISC_ARGS[@]}" "$@"
