#!/usr/bin/env bash
# Makes the model of this folder anew: text and chains, then two runs of training that follow each other.
#   models/chains/make.sh       about 45 minutes of one core; stopped by Ctrl-C, the same command goes on
# The model ends in results/chains-2; DEPTHWISE names the program (target/release/depthwise).
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
depthwise=${DEPTHWISE:-target/release/depthwise}

[ -e results/kjv-text/train.txt ] || models/kjv/fetch-text.sh results/kjv-text
[ -e results/chains-text/prompts.jsonl ] || models/chains/make-text.sh results/chains-text
for run in 1 2; do
    folder=results/chains-$run
    if [ -e "$folder/training-state.safetensors" ]; then
        "$depthwise" train --resume "$folder"
    else
        "$depthwise" train --config "configs/train/chains-$run.yaml" --out "$folder"
    fi
done
