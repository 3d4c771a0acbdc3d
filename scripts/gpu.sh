#!/usr/bin/env bash
# gpu.sh FOLDER: all that is to be learned on a machine with an NVIDIA GPU, in one folder.
#
# Says what the machine is and what it lacks; builds with CUDA; runs every GPU test against the CPU's results; profiles
# SmolLM2-135M, and larger models in the folder DEPTHWISE_MODELS; runs the nine combinations of batching and exit,
# measured and simulated; validates the simulator. A step that fails is noted, and the next one that
# does not need it goes on. About an hour, half of it the build.
#
#   FOLDER/machine.csv       the GPU, its driver, clocks and power, before and after
#   FOLDER/steps.csv         each step: ok, failed (with its exit status) or skipped, seconds
#   FOLDER/log/STEP.txt      what it said
#   FOLDER/profile-MODEL/    latency profiles, with kernels.csv: each kernel's time beside its floor
#   FOLDER/run-MODEL/        the nine combinations
#   FOLDER/validate-MODEL/   the simulator against the engine under load
#
# It needs the driver (580 or later for CUDA 13 from PyPI; an older one with the CUDA toolkit that came with it, in
# CUDA_HOME), Rust, a C++ compiler, 10 GB of disk, and the internet. Without internet, carry along what it would fetch:
# on a machine that has it, of the same kind of processor,
#
#     scripts/cuda-toolkit.sh build target/cuda-toolkit      # CUDA
#     scripts/fetch-models.sh                                # SmolLM2-135M
#     mkdir -p .cargo && cargo vendor target/vendor > .cargo/config.toml
#
# and copy the whole repository, target/ and models/fetched/ too, to the other.
#
#   DEPTHWISE_MODELS      a folder: every model folder or GGUF file in it is profiled as well
#   CUDA_VISIBLE_DEVICES  the GPU to take, if not the first
#   STEP_SECONDS          after which a step is taken for hung; 3600 if not set
set -uo pipefail
results=${1:?gpu.sh FOLDER: where to put the results}
mkdir -p "$results/log" || exit 2
results=$(realpath "$results")
cd "$(dirname "$0")/.." || exit 2
gpu=${CUDA_VISIBLE_DEVICES:-0}
gpu=${gpu%%,*}
binary=${CARGO_TARGET_DIR:-target}/release/depthwise
fetched=models/fetched/SmolLM2-135M-Instruct.Q4_1.gguf
echo "step,result,seconds" > "$results/steps.csv"

# note STEP RESULT SECONDS
note() {
    echo "$1,$2,$3" >> "$results/steps.csv"
    printf '%-28s %s, %s s\n' "$1" "$2" "$3"
}

# passed STEP: whether it has run, and well.
passed() { grep -q "^$1,ok," "$results/steps.csv"; }

# step NAME NEEDED COMMAND...: runs a command if the steps that it needs, separated by spaces, were well.
step() {
    local name=$1 needed=$2 started=$SECONDS status=0 one
    shift 2
    for one in $needed; do
        if ! passed "$one"; then
            note "$name" "skipped: needs $one" 0
            return
        fi
    done
    echo "== $name"
    timeout --kill-after=30 "${STEP_SECONDS:-3600}" "$@" > "$results/log/$name.txt" 2>&1 || status=$?
    case $status in
        0) note "$name" ok $((SECONDS - started)) ;;
        124 | 137) note "$name" "failed: hung" $((SECONDS - started)) ;;
        *)
            note "$name" "failed: exit status $status" $((SECONDS - started))
            tail -n 12 "$results/log/$name.txt" | sed 's/^/    /'
            ;;
    esac
}

# ask FIELD: what the driver says of the GPU.
ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits --id="$gpu" 2> /dev/null; }

# machine WHEN: a line of machine.csv.
machine() {
    local fields=name,driver_version,compute_cap,memory.total,memory.free,utilization.gpu,pstate,power.draw,power.limit
    fields+=,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu
    [ -e "$results/machine.csv" ] || echo "when,$fields" > "$results/machine.csv"
    echo "$1,$(ask "$fields" | sed 's/, /,/g')" >> "$results/machine.csv"
}

# The steps' own work, as far as it is more than a command.

# What the machine lacks, all of it at once.
check_machine() {
    local lacking=() capability memory driver cuda toolkit disk
    if ! command -v nvidia-smi > /dev/null; then
        lacking+=("NVIDIA's driver: there is no nvidia-smi")
    elif ! nvidia-smi --id="$gpu" > /dev/null; then
        lacking+=("a driver that answers, and a GPU of number $gpu: see what nvidia-smi says")
    else
        capability=$(ask compute_cap)
        [ "${capability%%.*}" -ge 8 ] ||
            lacking+=("a GPU of architecture 8.0 or later (A100, RTX 30): $(ask name) is of $capability")
        memory=$(ask memory.free)
        [ "$memory" -ge 4000 ] || lacking+=("4000 MiB of free GPU memory: $memory MiB are free of $(ask memory.total)")
        driver=$(ask driver_version)
        cuda=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9.]*\).*/\1/p')
        toolkit=$(toolkit_version)
        if [ -n "$cuda" ] && [ "$(printf '%s\n' "$toolkit" "$cuda" | sort -V | head -n 1)" != "$toolkit" ]; then
            lacking+=("a driver for CUDA $toolkit: driver $driver is for CUDA $cuda. Install a newer driver, or a CUDA toolkit of $cuda or older and set CUDA_HOME to it")
        fi
    fi
    command -v cargo > /dev/null || lacking+=("Rust: there is no cargo")
    command -v c++ > /dev/null || lacking+=("a C++ compiler: there is no c++")
    if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc > /dev/null && [ ! -e target/cuda-toolkit/.complete-build-13.0.88 ]; then
        python3 -m pip --version > /dev/null || lacking+=("pip, to fetch CUDA from PyPI; or a CUDA toolkit")
    fi
    disk=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
    [ "$disk" -ge 10 ] || lacking+=("10 GB of disk: $disk GB are free")
    if [ ${#lacking[@]} -gt 0 ]; then
        printf 'missing: %s\n' "${lacking[@]}"
        return 1
    fi
}

# The version of CUDA that will be built with.
toolkit_version() {
    local nvcc
    nvcc=$(command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc") || { echo 13.0; return; }
    "$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'
}

# Every GPU test. One that finds no GPU says so and passes: here that is a failure.
gpu_tests() {
    scripts/cuda-build.sh test --release --package "$1" "${@:2}" -- --nocapture --test-threads 1 2>&1 |
        tee "$results/log/tests-$1-output.txt"
    local status=${PIPESTATUS[0]}
    if grep -q SKIPPED "$results/log/tests-$1-output.txt"; then
        echo "a test found no GPU"
        return 1
    fi
    return "$status"
}

# profile_larger PATH: with as many loops as its layers allow.
profile_larger() {
    local loops out
    out=$results/profile-$(basename "$1" .gguf)
    for loops in 3 2 1; do
        "$binary" profile --model "$1" --loops $loops --device cuda --weights bf16 --max-batch 128 \
            --token-budget 512 --max-tokens 2048 --prefill-chunk 512 --out "$out" && return
    done
    return 1
}

export -f check_machine toolkit_version gpu_tests profile_larger ask
export results binary gpu

step machine "" bash -c check_machine
if ! passed machine; then
    echo "nothing was built or run: $results"
    exit 1
fi
machine before
busy=$(ask utilization.gpu)
[ "${busy:-0}" -le 10 ] 2> /dev/null || echo "warning: other work takes $busy% of the GPU: what is measured is too slow"

step build machine scripts/cuda-build.sh
step tests-engine build bash -c 'gpu_tests engine --test cuda --test exactness --test reference --test profile'
step tests-training build bash -c 'gpu_tests training --test gpu'
# The binary needs CUDA's libraries from here on. What fails to be found was found by the build.
set +u
. scripts/cuda-env.sh > "$results/log/environment.txt" 2>&1
set -u

step profile-kjv build "$binary" profile --model models/kjv --device cuda --weights bf16 --out "$results/profile-kjv"
step run-kjv build "$binary" run configs/cuda/kjv.yaml --out "$results/run-kjv"
if [ ! -e "$fetched" ] && [ -e "${DEPTHWISE_MODELS:-}/$(basename "$fetched")" ]; then
    mkdir -p "$(dirname "$fetched")" && ln -s "$(realpath "$DEPTHWISE_MODELS")/$(basename "$fetched")" "$fetched"
fi
if [ -e "$fetched" ]; then
    note models ok 0
else
    step models machine env DEPTHWISE_MODELS= scripts/fetch-models.sh
fi
step profile-smollm2 "build models" "$binary" profile --model "$fetched" --loops 3 --device cuda --weights bf16 \
    --max-batch 128 --token-budget 512 --max-tokens 1024 --out "$results/profile-smollm2"
step run-smollm2 "build models" "$binary" run configs/cuda/smollm2.yaml --out "$results/run-smollm2"
step validate-smollm2 "build models" "$binary" run configs/cuda/validation.yaml --out "$results/validate-smollm2"
if [ -n "${DEPTHWISE_MODELS:-}" ]; then
    for model in "$DEPTHWISE_MODELS"/*; do
        case $model in
            */"$(basename "$fetched")") continue ;;
            *.gguf) ;;
            *) [ -e "$model/config.json" ] || continue ;;
        esac
        step "profile-$(basename "$model" .gguf)" build bash -c 'profile_larger "$1"' _ "$model"
    done
fi
machine after

echo
column -s, -t < "$results/steps.csv" 2> /dev/null || cat "$results/steps.csv"
echo "results: $results"
! grep -q ',failed' "$results/steps.csv" && ! grep -q ',skipped' "$results/steps.csv"
