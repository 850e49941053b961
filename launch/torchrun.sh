#!/usr/bin/env bash
# One process per GPU under torchrun. On each of N hosts, with the address of the first one in HEAD:
#   NODES=2 NODE_RANK=0 HEAD=node0 bash launch/torchrun.sh CONFIG [a.b=c ...]
# PROCESSES=n sets the processes per host; SCRIPT=preflight.py checks the hosts instead. torchrun's own restarts stay
# off: launch/supervise.py knows the exit codes.
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-$root/.venv/bin/python}" -m torch.distributed.run --max-restarts 0 \
  --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${PROCESSES:-auto}" \
  --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
  "$root/launch/${SCRIPT:-pretrain.py}" "$@"
