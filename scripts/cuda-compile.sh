#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture, without a GPU and without CUDA installed; fails if one spills
# registers. What it fetches stays in target/cuda-toolkit.
set -euo pipefail
cd "$(dirname "$0")/.."
toolkit=$PWD/target/cuda-toolkit
scripts/cuda-toolkit.sh compile "$toolkit"
# Of the whole workspace, so that nothing is built again with other features.
cargo build --release --quiet --workspace --example cuda_compile
LD_LIBRARY_PATH="$toolkit/lib" "${CARGO_TARGET_DIR:-target}/release/examples/cuda_compile" "$toolkit"
