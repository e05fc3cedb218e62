# Megatron's flags for Qwen3-32B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 64
  --hidden-size 5120
  --ffn-hidden-size 25600
  --num-attention-heads 64
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --qk-layernorm
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --norm-epsilon 1e-6
  --vocab-size 151936
  --untie-embeddings-and-output-weights
)
