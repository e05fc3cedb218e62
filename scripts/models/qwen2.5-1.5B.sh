# Megatron's flags for Qwen2.5-1.5B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
# The base of the rotary frequencies is the Math model's; the general one takes MODEL_ARGS_ROTARY_BASE=1000000.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 28
  --hidden-size 1536
  --ffn-hidden-size 8960
  --num-attention-heads 12
  --group-query-attention
  --num-query-groups 2
  --add-qkv-bias
  --use-rotary-position-embeddings
  --rotary-base "${MODEL_ARGS_ROTARY_BASE:-10000}"
  --norm-epsilon 1e-6
  --vocab-size 151936
)
