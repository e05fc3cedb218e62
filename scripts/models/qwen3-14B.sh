# Megatron's flags for Qwen3-14B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 40
  --hidden-size 5120
  --ffn-hidden-size 17408
  --num-attention-heads 40
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
