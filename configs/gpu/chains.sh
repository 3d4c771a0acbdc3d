#!/usr/bin/env bash
# Speed at equal quality on GPUs, simulated: larger models in 6 loops with the exits of models/chains
# (docs/notebook/equal-quality.md). Fetches measured kernels (PyPI's aiconfigurator-core, Apache-2.0), makes latency profiles of
# them, records exits, and sweeps configs/gpu/chains.yaml into results/gpu/chains.
#   TABLES    the package's folder `systems`, if it is here already; else pip downloads it
#   DEPTHWISE the program (target/release/depthwise)
set -euo pipefail
cd "$(dirname "$0")/../.."
DEPTHWISE=${DEPTHWISE:-target/release/depthwise}
. configs/gpu/tables.sh
# GPU, its name in the tables, and the version of vLLM whose kernels were measured on it.
while read -r gpu table vllm; do
    for model in gemma-2b qwen3-8b; do
        "$DEPTHWISE" import aiconfigurator "$TABLES" --gpu "$table" --version "$vllm" --model "configs/gpu/$model.json" \
            --num-loops 6 --out "configs/gpu/profiles/$gpu/$model-6-loops" </dev/null
    done
done <<<"h100 h100_sxm 0.24.0
a100 a100_sxm 0.14.0
l40s l40s 0.24.0"

"$DEPTHWISE" record --model models/chains --temperature 1 --prompts models/chains/prompts.jsonl \
    --requests configs/gpu/chains-record.yaml --out results/gpu/chains-exits
"$DEPTHWISE" sweep configs/gpu/chains.yaml --out results/gpu/chains --restart
