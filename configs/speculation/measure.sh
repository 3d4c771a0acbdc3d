#!/usr/bin/env bash
# Speed-ups of self-speculation on this machine, predicted before they are measured, at 1, 4 and 16 sequences
# (docs/notebook/self-speculation.md). Writes results/speculation/measured/MODEL-SEQUENCES/speedups.csv. Ten minutes on two cores.
#   DEPTHWISE the program (target/release/depthwise)
set -euo pipefail
cd "$(dirname "$0")/../.."
DEPTHWISE=${DEPTHWISE:-target/release/depthwise}
validate() { # model, prompts, sequences, exit policies, more options
    "$DEPTHWISE" validate --model "models/$1" --prompts "models/$1/$2" --requests configs/speculation/requests.yaml \
        --batching sequence,depth --exit "$4" --max-batch "$3" --token-budget 128 --no-rates \
        --out "results/speculation/measured/$1-$3" "${@:5}"
}
for sequences in 1 4 16; do
    validate kjv prompts.txt "$sequences" none,speculate:static:0:4,speculate:margin:0.05:4 --kv-fill backfill
    validate chains prompts.jsonl "$sequences" none,speculate:static:0:4,speculate:gate:0.95:4 --temperature 1
done
