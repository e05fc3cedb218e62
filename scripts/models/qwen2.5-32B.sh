# Megatron's flags for Qwen2.5-32B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 64
  --hidden-size 5120
  --ffn-hidden-size 27648
  --num-attention-heads 40
  --group-query-attention
  --num-query-groups 8
  --add-qkv-bias
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --norm-epsilon 1e-5
  --vocab-size 152064
  --untie-embeddings-and-output-weights
)
