#!/usr/bin/env bash
# A stock SGLang server on CPU, on loopback; ready in about 40 seconds, when /health answers 200.
#
#   bash scripts/sglang_cpu/serve.sh MODEL_FOLDER PORT [SGLang's flags]
#
# Environment: SLIME_SGLANG_VENV  the environment that setup.sh made (.venv-sglang);  OMP_NUM_THREADS  threads (1).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
[ $# -ge 2 ] || { sed -n '2,6p' "$0" >&2; exit 2; }
model="$1" port="$2"
shift 2
python="${SLIME_SGLANG_VENV:-$ROOT/.venv-sglang}/bin/python"
[ -x "$python" ] || { echo "error: no stock SGLang at $python; set it up with: bash scripts/sglang_cpu/setup.sh" >&2; exit 1; }

export SGLANG_USE_CPU_ENGINE=1 SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=PASSIVE
exec "$python" -m sglang.launch_server --model-path "$model" --host 127.0.0.1 --port "$port" --device cpu \
  --attention-backend torch_native --sampling-backend pytorch --grammar-backend none \
  --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled \
  --mem-fraction-static 0.2 --max-total-tokens 20000 --skip-server-warmup "$@"
