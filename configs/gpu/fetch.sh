#!/usr/bin/env bash
# Fetches measured kernels (PyPI's aiconfigurator-core, Apache-2.0) and makes latency profiles of them in profiles/.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=0.12.0
depthwise=${DEPTHWISE:-"cargo run --release --quiet --"}

tables=$(mktemp -d)
trap 'rm -rf "$tables"' EXIT
pip download --quiet --no-deps --dest "$tables" "aiconfigurator-core==$version"
python3 -m zipfile -e "$tables"/*.whl "$tables"

# GPU, its name in the tables, and the version of vLLM whose kernels were measured on it.
while read -r gpu table vllm; do
    profile() { # NAME MODEL LOOPS RANK [OVERHEAD]
        $depthwise import aiconfigurator "$tables/aiconfigurator_core/systems" --gpu "$table" --version "$vllm" \
            --model "configs/gpu/$2.json" --num-loops "$3" --lora-rank "$4" --overhead-us "${5:-0}" \
            --out "configs/gpu/profiles/$gpu/$1" </dev/null
    }
    for model in gemma-2b gemma-2b-32k; do
        profile "$model-vanilla" "$model" 1 0
        for loops in 2 3; do
            for rank in 0 64 512; do
                profile "$model-$loops-loops-rank-$rank" "$model" "$loops" "$rank"
            done
        done
    done
    profile gemma-2b-vanilla-100us gemma-2b 1 0 100
    profile gemma-2b-3-loops-rank-64-100us gemma-2b 3 64 100
done <<EOF
h100 h100_sxm 0.24.0
a100 a100_sxm 0.14.0
EOF
