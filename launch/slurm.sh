#!/usr/bin/env bash
# One task per GPU on every node of a Slurm job; srun tells each its rank (launch/variables.py):
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 launch/slurm.sh CONFIG [a.b=c ...]
# SCRIPT=preflight.py checks the hosts instead. A node that fails ends the job's other tasks (--kill-on-bad-exit), and
# Slurm queues the job again where the run asks for it (exit codes 5 and 75).
#SBATCH --job-name=ernie5
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@300
set -uo pipefail
case "${1:-}" in -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
root="${ERNIE5_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
srun --kill-on-bad-exit=1 --wait=60 --export=ALL \
  "$root/.venv/bin/python" "$root/launch/${SCRIPT:-pretrain.py}" "$@"
code=$?
if [[ $code -eq 5 || $code -eq 75 ]] && [[ "${SLURM_RESTART_COUNT:-0}" -lt "${RESTARTS:-10}" ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
