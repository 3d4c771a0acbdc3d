#!/usr/bin/env bash
# Looped models in the wild, simulated on GPUs: Ouro, Nanbeige and Huginn with exit depths as their sources describe them
# (docs/notebook/looped-models.md). Fetches measured kernels (PyPI's aiconfigurator-core, Apache-2.0), makes latency profiles of
# them, draws exit depths, sweeps into results/looped, and fills the tables and the figure of the page.
#   TABLES    the package's folder `systems`, if it is here already; else pip downloads it
#   DEPTHWISE the program (target/release/depthwise)
set -euo pipefail
cd "$(dirname "$0")/../.."
DEPTHWISE=${DEPTHWISE:-target/release/depthwise}
. configs/gpu/tables.sh
import() { # GPU, its name in the tables, version of vLLM, model, loops, name of the profile, more options
    "$DEPTHWISE" import aiconfigurator "$TABLES" --gpu "$2" --version "$3" --model "configs/looped/$4.json" --num-loops "$5" \
        --out "configs/looped/profiles/$1/$6" "${@:7}" </dev/null
}
# GPU, its name in the tables, and the version of vLLM whose kernels were measured on it. Fewer loops are static depths.
while read -r gpu table vllm; do
    while read -r model loops; do
        for count in $loops; do
            import "$gpu" "$table" "$vllm" "$model" "$count" "$model-$count"
        done
    done <<<"ouro-1.4b 4 3 2
ouro-2.6b 4 3 2
nanbeige4.2-3b 2 1
huginn-0125 32 17 16 13"
done <<<"h100 h100_sxm 0.24.0
a100 a100_sxm 0.14.0
l40s l40s 0.24.0"
import h100 h100_sxm 0.24.0 ouro-1.4b 4 ouro-1.4b-4-overhead --overhead-us 100

cargo run --quiet --release -p traces --example looped_exits -- results/looped/exits
for sweep in study huginn cdb decode vllm-rlt; do
    "$DEPTHWISE" sweep "configs/looped/$sweep.yaml" --out "results/looped/$sweep" --restart
done
cargo run --quiet --release -p plots --example looped_models -- results/looped docs/notebook/looped-models.md \
    docs/figures/looped-models.png
