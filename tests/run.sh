#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them. Arguments go on to pytest:
#   bash tests/run.sh                      everything but gpu, multi_gpu and slow tests
#   bash tests/run.sh tests/model -x       one folder, stop at the first failure
#   bash tests/run.sh -m slow              the slow ones
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
bash launch/install.sh test

target=(tests)
for argument in "$@"; do
  [[ "$argument" != -* && -e "${argument%%::*}" ]] && target=()
done
# One thread per process: the tests use tiny tensors and start several processes at a time.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -c tests/pytest.ini --rootdir=. "${target[@]}" "$@"
