#!/usr/bin/env bash
# What Baton does on a GPU, in under eight minutes: single passes, methods, growing batches, hand-offs at real sizes, and
# the tests that need a GPU. Installs nothing.
#
#   benchmarks/gpu.sh [--device cuda] [--quick] [--dry-run]
#
# Results are gpu-*.json in $OUT, or else in benchmarks/results. --quick takes the smallest sizes, to see that everything
# runs, with --device cpu also where there is no GPU; --dry-run prints the commands. $PYTHON is the interpreter, or else
# .venv's. Exit status: 0, or 1 where a part failed or took too long (the others still run), or 2 without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda quick= dry=
while (($#)); do
  case $1 in
    --device) device=${2:?--device wants cuda or cpu}; shift ;;
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    *) echo "$0: no option $1 (--device, --quick, --dry-run)" >&2; exit 1 ;;
  esac
  shift
done

python=${PYTHON:-.venv/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
out=${OUT:-benchmarks/results}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false

if [[ -z $dry ]]; then
  "$python" -c 'import torch, typer, transformers' || { echo "Baton is not installed for $python" >&2; exit 1; }
  if [[ $device == cuda* ]] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "there is no GPU that PyTorch can use: nothing was measured (--device cpu --quick tries the commands)" >&2
    exit 2
  fi
  mkdir -p "$out"
fi

failed=0
# part NAME SECONDS COMMAND...: one part, stopped when it takes longer.
part() {
  local name=$1 limit=$2 status=0
  shift 2
  if [[ -n $dry ]]; then
    printf '%q ' "$@"; echo
    return
  fi
  echo "== $name"
  if [[ -n $quick ]]; then limit=600; fi # sizes keep it short, except on a machine that is busy
  timeout --signal=INT --kill-after=10 "$limit" "$@" || status=$?
  if ((status == 124 || status == 137)); then echo "$name took longer than $limit s" >&2; fi
  if ((status)); then failed=1; fi
}
# bench NAME SECONDS ARGUMENT...: `baton bench`, its result in gpu-NAME.json.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m baton.cli bench "$@" --device "$device" --json "$out/gpu-$name.json"
}

if [[ -n $quick ]]; then
  passes=(--shape t5-small --peer transformers --rows 1 --rows 4 --context 8 --repeats 3)
  scale=(--shape t5-small --batch 1 --batch 2 --context 8 --repeats 3)
  texts=(--limit 2 --max-new-tokens 8 --batch-size 2)
  pair=(--llm t5-small --slm t5-small --prompt-tokens 8 --tokens 4 --repeats 1)
else
  passes=(--shape llama-1b --peer transformers)
  scale=(--shape llama-1b --plot "$out/gpu-scale.png")
  texts=(--limit 16 --max-new-tokens 96 --batch-size 1 --batch-size 8)
  pair=(--llm t5-large --slm t5-small --tokens 16 --tokens 64 --repeats 3)
fi
small=models/pycode-draft

bench forward 90 forward "${passes[@]}"
bench decode 150 decode models/pycode-target --data code "${texts[@]}" \
  --method prompt-lookup --method token-recycling --method "draft-model:model=$small" --assistant "$small"
bench scale 90 scale "${scale[@]}"
bench handoff 60 handoff "${pair[@]}"
if [[ $device == cuda* ]]; then
  part tests 80 "$python" -m pytest -q -m gpu --junitxml "$out/gpu-tests.xml"
fi
exit "$failed"
