#!/usr/bin/env bash
# Trains with one process per GPU of this machine, or with PROCESSES=n processes on a CPU, through DeepSpeed's launcher:
#   bash launch/local.sh configs/pretrain/single_gpu.yaml train.steps=1000
#   PROCESSES=2 bash launch/local.sh configs/pretrain/quickstart.yaml
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  exit 2
fi
[[ -x "$root/.venv/bin/deepspeed" ]] || bash "$root/launch/install.sh"
export PATH="$root/.venv/bin:$PATH"
gpus=0
if command -v nvidia-smi >/dev/null; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)"; fi
if [[ "$gpus" -gt 0 ]]; then
  exec deepspeed --num_gpus "${PROCESSES:-$gpus}" "$root/launch/pretrain.py" "$@"
fi
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# --bind_cores_to_rank needs numactl, which a laptop lacks; one process per core is close enough.
exec torchrun --standalone --nproc_per_node "${PROCESSES:-1}" "$root/launch/pretrain.py" "$@"
