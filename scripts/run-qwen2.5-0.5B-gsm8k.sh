#!/usr/bin/env bash
# Qwen2.5-0.5B (Instruct or Coder-Instruct) learns GSM8K with GRPO: 32 prompts x 8 samples a step, 150 steps.
#
#   python examples/gsm8k/prepare.py --out data/gsm8k
#   MODEL=/path/to/Qwen2.5-Coder-0.5B-Instruct bash scripts/run-qwen2.5-0.5B-gsm8k.sh [extra train.py flags]
#
# LAYOUT says on what: colocated (one GPU, which trainer and engine share), apart (two GPUs: one trains, one generates),
# or async (two GPUs, at the same time). The same RUN_NAME goes on from the run's last checkpoint. Extra flags win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/models/qwen2.5-0.5B.sh

MODEL="${MODEL:-models/Qwen2.5-Coder-0.5B-Instruct}"
DATA="${DATA:-data/gsm8k}"
LAYOUT="${LAYOUT:-colocated}"
RUN_NAME="${RUN_NAME:-qwen2.5-0.5B-gsm8k-$LAYOUT}"
PYTHON="${PYTHON:-python3}"

CKPT_ARGS=(
  --hf-checkpoint "$MODEL"
  --run-name "$RUN_NAME"
  --save-interval 25 --keep-last 1
)
ROLLOUT_ARGS=(
  --prompt-data "$DATA/train.jsonl" --input-key prompt --label-key label --apply-chat-template --rollout-shuffle
  --rm-type math
  --num-rollout 150 --rollout-batch-size 32 --n-samples-per-prompt 8 --num-steps-per-rollout 2
  --rollout-max-response-len 400 --rollout-temperature 1
  # Of 48 groups up to 16 are dropped whose rewards are all alike and so teach nothing: benchmarks/h200.md
  --over-sampling-batch-size 48 --dynamic-sampling-filter-path
  slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std_with_fallback
)
EVAL_ARGS=(
  --eval-interval 50 --eval-prompt-data gsm8k_test "$DATA/test.jsonl"
  --n-samples-per-eval-prompt 1 --eval-temperature 0 --eval-max-response-len 400
)
GRPO_ARGS=(
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28 --entropy-coef 0
  --calculate-per-token-loss  # a long wrong answer counts token by token: benchmarks/h200.md has both ways
)
OPTIMIZER_ARGS=(
  --optimizer adam --lr 4e-6 --lr-decay-style cosine --min-lr 4e-7
  --weight-decay 0.01 --adam-beta1 0.9 --adam-beta2 0.98
)
PERF_ARGS=(
  --use-dynamic-batch-size --max-tokens-per-gpu 16384
)
SGLANG_ARGS=(
  --sglang-cuda-graph-max-bs-decode 384 --sglang-context-length 2048
)
case "$LAYOUT" in
  colocated) MAIN=train.py LAYOUT_ARGS=(--colocate --actor-num-gpus-per-node 1 --num-gpus-per-node 1) ;;
  apart) MAIN=train.py LAYOUT_ARGS=(--actor-num-gpus-per-node 1 --rollout-num-gpus 1 --num-gpus-per-node 2) ;;
  async) MAIN=train_async.py LAYOUT_ARGS=(--actor-num-gpus-per-node 1 --rollout-num-gpus 1 --num-gpus-per-node 2) ;;
  *) echo "error: LAYOUT=$LAYOUT; use colocated, apart or async" >&2; exit 2 ;;
esac

exec "$PYTHON" "$MAIN" \
  "${MODEL_ARGS[@]}" "${CKPT_ARGS[@]}" "${ROLLOUT_ARGS[@]}" "${EVAL_ARGS[@]}" "${GRPO_ARGS[@]}" \
  "${OPTIMIZER_ARGS[@]}" "${PERF_ARGS[@]}" "${SGLANG_ARGS[@]}" "${LAYOUT_ARGS[@]}" "$@"
