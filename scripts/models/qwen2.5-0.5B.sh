# Megatron's flags for Qwen2.5-0.5B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 24
  --hidden-size 896
  --ffn-hidden-size 4864
  --num-attention-heads 14
  --group-query-attention
  --num-query-groups 2
  --add-qkv-bias
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --norm-epsilon 1e-6
  --vocab-size 151936
)
