#!/usr/bin/env bash
# Installs, pretrains a small model on the embedded corpus, evaluates it, generates with it, and writes a report:
#   bash launch/quickstart.sh [--from-scratch] [a.b=c ...]
# --from-scratch trains the three tokenizers first, those of pictures and of sound for TOKENIZER_MINUTES each (30).
# Settings at the end go to the training. Run it again to go on where it stopped. About ten minutes on two CPU cores
# after the installation, with the embedded tokenizers.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
from_scratch=no
minutes="${TOKENIZER_MINUTES:-30}"
overrides=()
run_dir=runs/quickstart
for argument in "$@"; do
  case "$argument" in
    -h | --help) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    --from-scratch) from_scratch=yes ;;
    train.run_dir=*) run_dir="${argument#*=}"; run_dir="${run_dir/#~\//$HOME/}"; overrides+=("$argument") ;;
    *=*) overrides+=("$argument") ;;
    *) echo "ConfigError: quickstart.sh does not know '$argument'. It takes --from-scratch and settings a.b=c." >&2; exit 2 ;;
  esac
done
if ! refusal="$(mkdir -p "$run_dir" 2>&1)"; then
  echo "ConfigError: train.run_dir=$run_dir cannot be a run directory (${refusal##*: }). Name another place." >&2
  exit 2
fi
bash launch/install.sh
export PATH="$root/.venv/bin:$PATH"

part() {  # name, command: runs it under a heading and notes the time it took for the report
  local name="$1" started=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@"
  printf '{"name": "%s", "seconds": %d}\n' "$name" $((SECONDS - started)) >>"$run_dir/timings.jsonl"
}

has_gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then has_gpu=yes; fi

if [[ "$from_scratch" == yes ]]; then
  for kind in text visual audio; do
    out="$run_dir/tokenizer_training/$kind" recipe="$kind"
    if [[ "$kind" == visual && "$has_gpu" == yes ]]; then recipe=visual_gpu; fi
    part "train the $kind tokenizer" ernie5 tokenizer train "configs/tokenizer/$recipe.yaml" --out "$out" \
      "train.minutes=$minutes" train.threads=0
    if [[ -d "$out/export" ]]; then out="$out/export"; fi
    overrides+=("tokenizers.$kind=$out")
  done
fi

# One process with one thread per core (1, 2 or 4, as the configuration has four streams) is twice as fast on a CPU as
# one process with as many threads: most products of so small a model are too small to be shared by threads.
processes=1
if [[ "$has_gpu" == no ]]; then
  cores="$(nproc)"
  if [[ "$cores" -ge 4 ]]; then processes=4; elif [[ "$cores" -ge 2 ]]; then processes=2; fi
fi
train() {
  local config=configs/pretrain/quickstart.yaml
  if [[ "$processes" -eq 1 ]]; then
    ernie5 train "$config" ${overrides[@]+"${overrides[@]}"}
  else
    RANK_LOGS="$run_dir/ranks" python launch/spawn.py "$processes" "$config" \
      "batch.micro_sequences=$((8 / processes))" engine.cpu_threads=1 ${overrides[@]+"${overrides[@]}"}
  fi
}
# Evaluation and samples side by side, one thread each: steps of generation are too small for more.
measure() {
  [[ "$processes" -eq 1 ]] || export OMP_NUM_THREADS=1
  ernie5 evaluate "$run_dir" &
  local evaluation=$!
  ernie5 generate "$run_dir" --gallery "$run_dir/samples/final"
  wait "$evaluation"
}
part pretrain train
part "evaluate and generate" measure
ernie5 report "$run_dir"
cat <<END
Open the report in a browser:   $root/$run_dir/report.html
Look at the samples:            $run_dir/samples/final/
Ask it for something:           .venv/bin/ernie5 generate $run_dir --prompt "a cat" --to image --out cat.png
Watch the curves:               .venv/bin/tensorboard --logdir $run_dir/tensorboard
Train longer:                   bash launch/quickstart.sh train.steps=1000
END
