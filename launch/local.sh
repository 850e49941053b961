#!/usr/bin/env bash
# Trains with one process per GPU of this machine through DeepSpeed's launcher, or on a CPU with one process per core
# (PROCESSES=n sets their number; data.streams and batch.global_sequences must be multiples of it):
#   bash launch/local.sh configs/pretrain/single_gpu.yaml train.steps=1000
#   PROCESSES=2 bash launch/local.sh configs/pretrain/quickstart.yaml
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
case "${1:-}" in
  -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
  "") sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
[[ -x "$root/.venv/bin/deepspeed" ]] || bash "$root/launch/install.sh"
export PATH="$root/.venv/bin:$PATH"
gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"; fi
if [[ "$gpus" -gt 0 ]]; then
  exec deepspeed --num_gpus "${PROCESSES:-$gpus}" "$root/launch/pretrain.py" "$@"
fi
exec python "$root/launch/spawn.py" "${PROCESSES:-$(nproc)}" "$@"
