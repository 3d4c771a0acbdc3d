#!/usr/bin/env bash
# Self-speculation on GPUs, simulated (docs/notebook/self-speculation.md). Fetches measured kernels (PyPI's aiconfigurator-core,
# Apache-2.0), makes latency profiles of them, records exits, sweeps into results/speculation, and fills the tables and the
# figure of the page.
#   TABLES    the package's folder `systems`, if it is here already; else pip downloads it
#   DEPTHWISE the program (target/release/depthwise)
set -euo pipefail
cd "$(dirname "$0")/../.."
DEPTHWISE=${DEPTHWISE:-target/release/depthwise}
. configs/gpu/tables.sh
# GPU, its name in the tables, the version of vLLM whose kernels were measured on it, model, loops.
while read -r gpu table vllm model loops; do
    "$DEPTHWISE" import aiconfigurator "$TABLES" --gpu "$table" --version "$vllm" --model "configs/$model.json" \
        --num-loops "$loops" --out "configs/speculation/profiles/$gpu/$(basename "$model")-$loops" </dev/null
done <<<"h100 h100_sxm 0.24.0 looped/ouro-1.4b 4
h100 h100_sxm 0.24.0 speculation/llama-8b 4
h100 h100_sxm 0.24.0 gpu/gemma-2b 6
h100 h100_sxm 0.24.0 gpu/qwen3-8b 6
l40s l40s 0.24.0 looped/ouro-1.4b 4
l40s l40s 0.24.0 speculation/llama-8b 4"

"$DEPTHWISE" record --model models/kjv --prompts models/kjv/prompts.txt \
    --requests configs/gpu/record.yaml --out results/speculation/kjv-exits
"$DEPTHWISE" record --model models/chains --temperature 1 --prompts models/chains/prompts.jsonl \
    --requests configs/gpu/chains-record.yaml --out results/speculation/chains-exits
for sweep in four-loops six-loops long-histories; do
    "$DEPTHWISE" sweep "configs/speculation/$sweep.yaml" --out "results/speculation/$sweep" --restart
done
cargo run --quiet --release -p plots --example self_speculation -- results/speculation docs/notebook/self-speculation.md \
    docs/figures/self-speculation.png
