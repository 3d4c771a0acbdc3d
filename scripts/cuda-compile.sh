#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture, without a GPU and without CUDA installed; fails if one spills
# registers. What it fetches stays in target/cuda-toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
toolkit=$PWD/target/cuda-toolkit
scripts/cuda-toolkit.sh compile "$toolkit"
LD_LIBRARY_PATH="$toolkit/lib" cargo run --release --quiet -p engine --example cuda_compile -- "$toolkit"
