# Megatron's flags for Llama-3.2-3B-Instruct-amd: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 28
  --hidden-size 3072
  --ffn-hidden-size 8192
  --num-attention-heads 24
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --use-rotary-position-embeddings
  --rotary-base 500000
  --norm-epsilon 1e-5
  --vocab-size 128256
  --max-position-embeddings 131072
  --use-rope-scaling
  --rotary-scaling-factor 32.0
)
