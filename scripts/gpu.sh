#!/usr/bin/env bash
# gpu.sh FOLDER: on a machine with an NVIDIA GPU, says what it is, builds, and runs every CUDA kernel's test on it.
# FOLDER gets machine.txt and tests.txt.
set -euo pipefail
folder=${1:?folder for the results}
mkdir -p "$folder"
folder=$(realpath "$folder")
cd "$(dirname "$0")/.."

missing() {
    echo "gpu.sh: $*" >&2
    exit 1
}

command -v nvidia-smi > /dev/null || missing "there is no nvidia-smi: install NVIDIA's driver"
query=name,driver_version,compute_cap,memory.total,memory.free,clocks.max.sm,clocks.max.mem,power.limit,pstate
nvidia-smi --query-gpu=$query --format=csv > "$folder/machine.txt" || missing "the driver does not answer: $(nvidia-smi)"
cat "$folder/machine.txt"
field() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits --id=0; }

capability=$(field compute_cap)
[ "${capability%%.*}" -ge 8 ] || missing "GPU 0 is of architecture $capability, the kernels need 8.0 or later (bf16)"
memory=$(field memory.free)
[ "$memory" -ge 2000 ] || missing "GPU 0 has $memory MiB free, the tests need 2000"
if ! command -v nvcc > /dev/null && [ -z "${CUDA_HOME:-}" ]; then
    driver=$(field driver_version)
    [ "${driver%%.*}" -ge 580 ] ||
        missing "driver $driver is too old for CUDA 13 from PyPI, which needs 580: install a CUDA toolkit of the driver's version"
fi
command -v cargo > /dev/null || missing "there is no cargo: install Rust"

scripts/cuda-build.sh test --release --package engine --test cuda -- --nocapture 2>&1 | tee "$folder/tests.txt"
if grep -q SKIPPED "$folder/tests.txt"; then
    missing "the tests found no GPU"
fi
echo "every kernel gives the CPU's results on this GPU: $folder"
