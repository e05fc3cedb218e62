# Shared by the scripts of this folder: a virtual environment in .venv with slime and what it needs.
#
#   source scripts/_common.sh
#   set_up quickstart          # or: set_up dev
#   "$VENV_PYTHON" train.py ...
#
# Safe to repeat: a second call finds everything there and takes no time. Environment variables that change it:
#   PYTHON        the Python to make .venv with (3.11 to 3.13)
#   SLIME_DEVICE  cpu or cuda instead of looking for a GPU

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
TORCH_FOR_CPU="2.13.0"

# Processes share the bytecode that the first of them compiled; without it each start compiles torch anew.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# set_up EXTRA: .venv with slime and this extra of pyproject.toml, unless it is there already.
set_up() {
  cd "$ROOT"
  "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
  local device extras="$1" stamp="$VENV/slime-$1.stamp" wanted
  device="$(find_device)"
  if [ "$device" = cuda ]; then extras="gpu,$extras"; fi
  wanted="$("$VENV_PYTHON" -c 'import hashlib, sys; print(sys.version.split()[0], hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' pyproject.toml scripts/_common.sh) $extras"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "installing slime[$extras] into .venv (about 1 GB on a CPU machine, the first time some minutes)"
    install_packages "$extras" "$device"
    say "compiling the modules that every process imports"
    "$VENV_PYTHON" -c 'import torch, ray, megatron.core, math_verify, sglang_router.launch_router, torch.utils.tensorboard, transformers.models.llama.modeling_llama' >/dev/null 2>&1 || true
    printf '%s\n' "$wanted" >"$stamp"
  fi
  say "ready: $("$VENV_PYTHON" -V) in .venv, device $device"
}

make_venv() {
  local python
  python="$(find_python)" || fail "No Python 3.11, 3.12 or 3.13 with the venv module was found. Install one (for example: apt install python3.12 python3.12-venv), or name it: PYTHON=/path/to/python bash $0"
  say "making .venv with $("$python" -V) ($python)"
  "$python" -m venv --clear "$VENV"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then fail "PYTHON=$PYTHON is not a Python from 3.11 to 3.13 with the venv module."; fi
  done
  return 1
}

find_device() {
  if [ -n "${SLIME_DEVICE:-}" ]; then echo "$SLIME_DEVICE"
  elif ls /proc/driver/nvidia/gpus/* >/dev/null 2>&1 || nvidia-smi -L >/dev/null 2>&1; then echo cuda
  else echo cpu
  fi
}

# uv installs the same packages in a fifth of pip's CPU time; pip does it where uv cannot.
install_packages() {
  local extras="$1" device="$2"
  if "$VENV_PYTHON" -m pip install --quiet uv && install_with_uv "$extras" "$device"; then return 0; fi
  say "uv could not install it (see above); trying pip"
  install_with_pip "$extras" "$device"
}

install_with_uv() {
  local extras="$1" device="$2" torch=()
  local uv=("$VENV/bin/uv" pip install --python "$VENV_PYTHON" --index-strategy unsafe-best-match)
  read_pip_settings
  uv+=("${UV_SETTINGS[@]}")
  if [ "$device" = cpu ]; then
    if "${uv[@]}" --dry-run --no-deps --quiet "torch==$TORCH_FOR_CPU+cpu" 2>/dev/null; then
      torch=("torch==$TORCH_FOR_CPU+cpu")
    elif "${uv[@]}" --dry-run --no-deps --quiet --torch-backend cpu "torch==$TORCH_FOR_CPU" 2>/dev/null; then
      torch=(--torch-backend cpu "torch==$TORCH_FOR_CPU")
    else
      say "no CPU build of torch $TORCH_FOR_CPU can be reached: the package index offers the CUDA build, which works too but is larger"
      torch=("torch==$TORCH_FOR_CPU")
    fi
  fi
  "${uv[@]}" "${torch[@]}" --editable ".[$extras]"
}

install_with_pip() {
  local extras="$1" device="$2" pip=("$VENV_PYTHON" -m pip install --no-compile)
  if [ "$device" = cpu ] && ! "${pip[@]}" "torch==$TORCH_FOR_CPU+cpu"; then
    say "no CPU build of torch $TORCH_FOR_CPU can be reached: the package index offers the CUDA build, which works too but is larger"
    "${pip[@]}" "torch==$TORCH_FOR_CPU"
  fi
  "${pip[@]}" --editable ".[$extras]"
}

# uv reads none of pip's configuration: translate where packages come from into UV_SETTINGS.
read_pip_settings() {
  local line key value word
  UV_SETTINGS=()
  while IFS= read -r line; do
    key="${line%%=*}" && key="${key##*.}"
    value="${line#*=}" && value="${value#[\'\"]}" && value="${value%[\'\"]}" && value="${value//\\n/ }"
    case "$key" in
      index-url) UV_SETTINGS+=(--default-index "$value") ;;
      extra-index-url) for word in $value; do UV_SETTINGS+=(--index "$word"); done ;;
      find-links) for word in $value; do UV_SETTINGS+=(--find-links "$word"); done ;;
      trusted-host) for word in $value; do UV_SETTINGS+=(--allow-insecure-host "$word"); done ;;
      no-index) if [ "$value" = true ]; then UV_SETTINGS+=(--no-index); fi ;;
      cert) export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}" ;;
    esac
  done < <("$VENV_PYTHON" -m pip config list 2>/dev/null)
}
