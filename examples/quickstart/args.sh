# The quick start's command line, as the array ARGS. Before sourcing it, set DATA (the folder of prepare.py) and RUN_NAME.

ARGS=(
  --run-name "$RUN_NAME"
  # the model, and where the trained one goes
  --hf-checkpoint "$DATA/SmolLM2-135M-Instruct"
  --save-hf "${OUTPUT_DIR:-outputs}/$RUN_NAME/hf"
  # prompts and reward: 1 if the last number of the response is the label
  --prompt-data "$DATA/train.jsonl" --input-key prompt --label-key label --rollout-shuffle
  --rm-type last_number
  # each step: 16 prompts x 8 samples, one optimizer step
  --num-rollout 30 --rollout-batch-size 16 --n-samples-per-prompt 8 --num-steps-per-rollout 1
  --rollout-max-response-len 6 --rollout-stop $'\n' --rollout-temperature 1
  # greedy accuracy on prompts that are never trained on
  --eval-interval 10 --eval-prompt-data held_out "$DATA/held_out.jsonl" --eval-temperature 0
  # GRPO
  --advantage-estimator grpo --eps-clip 0.2 --eps-clip-high 0.28
  --optimizer adam --lr 2e-5 --lr-decay-style linear --min-lr 0 --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.95
  # two CPU devices, on which trainer ranks and engines take turns (also where there is a GPU)
  --device cpu
  --colocate --actor-num-nodes 1 --actor-num-gpus-per-node 2 --num-gpus-per-node 2
  --use-dynamic-batch-size --max-tokens-per-gpu 2048
)
