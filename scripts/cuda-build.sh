#!/usr/bin/env bash
# cuda-build.sh [cargo arguments]: runs cargo with the feature `cuda`, by default to build the binary. Where no CUDA is
# installed its compiler and libraries come from PyPI; what is built links without a driver, and runs where there is one.
# Before running it by hand: . scripts/cuda-env.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
    set -- build --release --package depthwise
fi
. scripts/cuda-env.sh
command=$1
shift
cargo "$command" --features cuda "$@"
