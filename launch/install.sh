#!/usr/bin/env bash
# Makes .venv in the repository root and installs ernie5 into it: bash launch/install.sh [test]
# The user's pip settings (pip.conf, PIP_INDEX_URL, ...) decide where packages come from. PYTHON names an interpreter.
set -euo pipefail
case "${1:-}" in
  "" | test) extra="${1:-}" ;;
  -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "ConfigError: install.sh does not know '$1'. It takes nothing, or the word test." >&2; exit 2 ;;
esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
TORCH_VERSION=2.13.0

missing() {  # what is missing, why, Debian package
  echo "EnvironmentFault: $1 is missing ($2). On Debian or Ubuntu: sudo apt-get install $3" >&2
  exit 3
}

find_python() {
  local name
  for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
}

# Everything that would stop the installation half-way is checked before it starts.
python="$(find_python)"
[[ -n "$python" ]] || missing "Python 3.11 or newer" "python3 is $(python3 --version 2>&1 || true)" "python3.11"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
"$python" -c 'import venv, ensurepip' 2>/dev/null \
  || missing "the venv module of $python" "packages are installed into .venv" "python$version-venv"
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
  || missing "Python.h of $python" "DeepSpeed compiles its operators" "python$version-dev"
command -v g++ >/dev/null || missing "g++" "DeepSpeed compiles its operators" "g++"

# A stamp of everything that decides the result makes the second run instant.
has_gpu=no
command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU && has_gpu=yes
stamp="$(cat setup.py launch/install.sh | cksum) $root $python $version gpu=$has_gpu"
[[ "$(cat ".venv/ernie5-installed${extra:+-$extra}" 2>/dev/null)" == "$stamp" ]] && exit 0

echo "Installing ernie5 into $root/.venv (Python $version, NVIDIA GPU: $has_gpu). This takes a few minutes, once."
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" "pip>=24" "setuptools>=77" wheel

# A .venv that was made where there is no GPU (a login node) has a torch that would leave this one idle.
if [[ "$has_gpu" == yes ]] && .venv/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
then
  echo "The torch in .venv was built without CUDA: exchanging it."
  .venv/bin/python -m pip uninstall --quiet --yes torch
fi
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  if [[ "$has_gpu" == yes ]]; then
    "${pip[@]}" "torch==$TORCH_VERSION"
  elif ! "${pip[@]}" "torch==$TORCH_VERSION+cpu" 2>/dev/null; then
    echo "The package index in use has no CPU-only build of torch: installing its standard build, which is larger." \
      "To avoid that, add PyTorch's CPU index to pip's settings (PIP_EXTRA_INDEX_URL)."
    "${pip[@]}" "torch==$TORCH_VERSION"
  fi
fi
# --use-pep517: without it Python 3.11's stock tools run `setup.py develop`, which misses kernels/ -> ernie5_kernels.
PYTHONWARNINGS=ignore "${pip[@]}" --use-pep517 -e ".${extra:+[$extra]}"
(cd / && "$root/.venv/bin/python" -c 'import ernie5_kernels, ernie5, torch, deepspeed' >/dev/null 2>&1) || {
  echo "EnvironmentFault: the installation is damaged. Remove $root/.venv and run this command again." >&2
  exit 3
}
# The C++ kernels are compiled on first use; better here than inside the first run.
(cd / && "$root/.venv/bin/python" -c 'from ernie5_kernels.native.library import native_library; native_library()')
echo "Installed. So that your shell finds the command ernie5: source $root/.venv/bin/activate"
echo "$stamp" >".venv/ernie5-installed${extra:+-$extra}"
