# Megatron's flags for Qwen2.5-7B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 28
  --hidden-size 3584
  --ffn-hidden-size 18944
  --num-attention-heads 28
  --group-query-attention
  --num-query-groups 4
  --add-qkv-bias
  --use-rotary-position-embeddings
  --rotary-base 1000000
  --norm-epsilon 1e-6
  --vocab-size 152064
  --untie-embeddings-and-output-weights
)
