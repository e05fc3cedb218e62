# Megatron's flags for Qwen3-1.7B: `source` this, then give ${MODEL_ARGS[@]} to train.py.
# MODEL_ARGS_ROTARY_BASE overrides the base of the rotary frequencies (long-context releases change it).
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 28
  --hidden-size 2048
  --ffn-hidden-size 6144
  --num-attention-heads 16
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --qk-layernorm
  --use-rotary-position-embeddings
  --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"
  --norm-epsilon 1e-6
  --vocab-size 151936
)
