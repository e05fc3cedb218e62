# Megatron's flags for Llama-3.1-8B-Instruct: `source` this, then give ${MODEL_ARGS[@]} to train.py.
MODEL_ARGS=(
  --swiglu
  --disable-bias-linear
  --normalization RMSNorm
  --num-layers 32
  --hidden-size 4096
  --ffn-hidden-size 14336
  --num-attention-heads 32
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
  --use-rotary-position-embeddings
  --rotary-base 500000
  --norm-epsilon 1e-5
  --vocab-size 128256
  --untie-embeddings-and-output-weights
  --max-position-embeddings 131072
  --use-rope-scaling
  --rotary-scaling-factor 8.0
)
