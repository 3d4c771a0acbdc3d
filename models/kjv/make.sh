#!/usr/bin/env bash
# Makes the model of this folder anew: the text, a full-size model, its conversion, uptraining with early exits
# and gates.
#   models/kjv/make.sh          about an hour of two cores; stopped by Ctrl-C, the same command goes on
# The model ends in results/kjv; DEPTHWISE names the program (target/release/depthwise).
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
depthwise=${DEPTHWISE:-target/release/depthwise}

train() {
    local folder=$1 config=$2
    if [ -e "$folder/training-state.safetensors" ]; then
        "$depthwise" train --resume "$folder"
    else
        "$depthwise" train --config "$config" --out "$folder"
    fi
}

[ -e results/kjv-text/train.txt ] || models/kjv/fetch-text.sh results/kjv-text
train results/kjv-vanilla configs/train/kjv-vanilla.yaml
[ -e results/kjv-converted ] || "$depthwise" convert results/kjv-vanilla --loops 4 --init average --rank 2 --out results/kjv-converted
train results/kjv-uptrained configs/train/kjv-uptrain.yaml
train results/kjv configs/train/kjv.yaml
