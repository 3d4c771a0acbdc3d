#!/usr/bin/env bash
# cuda-build.sh [cargo arguments]: runs cargo with the feature `cuda`, by default to build the binary. Where no CUDA is
# installed its compiler and libraries come from PyPI; what is built then links, and runs where there is a driver.
#   CUDA_COMPUTE_CAP  the architecture of candle's kernels, as in 80 or 90; 80 if there is no GPU to ask
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# = 0 ]; then
    set -- build --release --package depthwise
fi
if ! command -v nvcc > /dev/null && [ -z "${CUDA_HOME:-}" ]; then
    export CUDA_HOME=$PWD/target/cuda-toolkit
    scripts/cuda-toolkit.sh build "$CUDA_HOME"
    export PATH="$CUDA_HOME/bin:$PATH"
    libraries=$CUDA_HOME/lib
    # The driver's libcuda, where there is one, must be found first when a program runs.
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
    if ! ldconfig -p | grep -q 'libcuda\.so\.1'; then
        LD_LIBRARY_PATH+=":$libraries/stubs"
    fi
    export LIBRARY_PATH="$libraries:$libraries/stubs"
fi
if ! command -v nvidia-smi > /dev/null; then
    export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
fi
command=$1
shift
cargo "$command" --features cuda "$@"
