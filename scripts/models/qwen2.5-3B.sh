# Megatron's flags for Qwen2.5-3B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 36
  --hidden-size 2048
  --ffn-hidden-size 11008
  --num-attention-heads 16
  --group-query-attention
  --num-query-groups 2
  --add-qkv-bias
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --norm-epsilon 1e-6
  --vocab-size 151936
)
