#!/usr/bin/env bash
# Stock SGLang on a machine without a GPU, in a virtual environment of its own: for contract tests, not for speed.
#
#   bash scripts/sglang_cpu/setup.sh [VENV]        VENV: .venv-sglang if not given; 3 GB, about 3 minutes
#
# Safe to repeat. Its versions are pinned and differ from slime's own environment, hence a second one. Afterwards:
#   bash scripts/test.sh -m sglang                                  the engine contract on this server
#   bash scripts/sglang_cpu/serve.sh MODEL_FOLDER PORT              the server alone
#   SLIME_SGLANG_PYTHON=.venv-sglang/bin/python python train.py --rollout-engine sglang ...
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/_common.sh
source "$HERE/../_common.sh"

target="${1:-$ROOT/.venv-sglang}"
stamp="$target/slime-sglang.stamp"
python="$target/bin/python"
wanted="$(cat "$HERE/requirements.txt" "$HERE"/stubs/* "$HERE/setup.sh" | cksum)"

if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  say "ready: stock SGLang in $target"
  exit 0
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
  base="$(find_python)" || fail "No Python 3.11, 3.12 or 3.13 with the venv module was found; name one: PYTHON=/path/to/python bash $0"
  say "making $target with $("$base" -V)"
  "$base" -m venv --clear "$target"
fi
pip=("$python" -m pip --disable-pip-version-check install --progress-bar off)
say "1 of 3: torch $TORCH_FOR_CPU for CPU (200 MB)"
"${pip[@]}" --quiet "torch==$TORCH_FOR_CPU+cpu" 2>/dev/null || "${pip[@]}" --quiet "torch==$TORCH_FOR_CPU"
say "2 of 3: SGLang and what it imports ($(grep -c == "$HERE/requirements.txt") packages, 2 GB)"
# Without dependencies: SGLang's own list has GPU packages that have no place here.
"${pip[@]}" --quiet --no-deps --requirement "$HERE/requirements.txt"
say "3 of 3: import stubs for what has no CPU build"
cp "$HERE"/stubs/* "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/"
"$python" -c 'import sglang.srt.server_args' >/dev/null || fail "SGLang was installed in $target but cannot be imported: see above."
printf '%s\n' "$wanted" >"$stamp"
say "ready: SGLang $("$python" -c 'import importlib.metadata as m; print(m.version("sglang"))') in $target"
