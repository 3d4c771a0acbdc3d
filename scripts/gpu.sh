#!/usr/bin/env bash
# gpu.sh FOLDER: what is to be learned on a machine with an NVIDIA GPU, the most important first, in one folder.
# gpu.sh --prepare: on a machine without a GPU, builds what the other machine then need not build: target/gpu.
#
# Says what the machine is and what it lacks; checks the kernels against the CPU's results; measures latency profiles and
# pass logs of models/chains and of Gemma 2B's shape with random weights, in one loop and in three; tests the simulator in
# closed loops; and, if there is time left, runs the nine combinations of batching and exit, every GPU test, and larger
# models. Each step has a time limit. A step that fails is noted, and the next one that does not need it goes on; a step
# whose limit no longer fits into the budget is skipped.
#
#   FOLDER/profiles/GPU/          what is worth keeping, at most 3 MB: to be copied to profiles/ of the repository
#   FOLDER/profiles/GPU/MODEL/    profile.yaml, latency.csv, origin.yaml, device.yaml, kernels.csv; pass logs of the profile
#                                 (passes.parquet) and of replays (replay.parquet); comparisons with the simulator
#   FOLDER/machine.csv            the GPU, its driver, clocks and power, before and after
#   FOLDER/steps.csv              each step: ok, failed (with its exit status) or skipped, seconds
#   FOLDER/log/STEP.txt           what it said
#   FOLDER/profile-MODEL/, replay-MODEL/, validate-MODEL/, run-MODEL/    whole results
#
# It needs the driver (580 or later for CUDA 13 from PyPI; an older one with the CUDA toolkit that came with it, in
# CUDA_HOME). To build there, it also needs Rust, a C++ compiler, 10 GB of disk, and the internet. To build elsewhere, on a
# machine of the same kind of processor:
#
#     scripts/gpu.sh --prepare             # target/gpu: the program and the tests
#     scripts/fetch-models.sh              # SmolLM2-135M, for the last steps
#
# and copy the repository with target/gpu (and models/fetched, and target/cuda-toolkit where no CUDA is installed).
#
#   GPU_MINUTES           minutes for all steps after the build; 12 if not set, 0 for no limit
#   GPU_NAME              name of the folder of what is worth keeping; by default that of the GPU, as h100-80gb-hbm3
#   STEP_SECONDS          limit of every step, instead of its own
#   DRY_RUN=1             prints the steps with their limits, and runs none
#   DEVICE=cpu            a rehearsal without a GPU: tiny models and few requests, no tests
#   DEPTHWISE_MODELS      a folder: every model folder or GGUF file in it is profiled at the end
#   CUDA_VISIBLE_DEVICES  the GPU to take, if not the first
set -uo pipefail
root=$(realpath "$(dirname "$0")/..")
prepared=target/gpu
carried_tests=(cuda exactness reference profile)

# prepare: builds the program and the tests, and collects them.
prepare() {
    cd "$root" || return
    mkdir -p $prepared/tests
    scripts/cuda-build.sh && cp target/release/depthwise $prepared/ || return
    local test found
    for test in "${carried_tests[@]}"; do
        found=$(scripts/cuda-build.sh test --release --no-run --package engine --test "$test" 2>&1 |
            tee /dev/stderr | sed -n "s/.*Executable.*(\(.*\/$test-[^)]*\)).*/\1/p" | tail -n 1)
        [ -n "$found" ] && cp "$found" "$prepared/tests/$test" || return
    done
    strip --strip-debug $prepared/depthwise $prepared/tests/* 2> /dev/null
    du -sh $prepared
}

if [ "${1:-}" = --prepare ]; then
    prepare
    exit
fi
results=${1:?gpu.sh FOLDER: where to put the results}
mkdir -p "$results/log" || exit 2
results=$(realpath "$results")
cd "$root" || exit 2
device=${DEVICE:-cuda}
gpu=${CUDA_VISIBLE_DEVICES:-0}
gpu=${gpu%%,*}
minutes=${GPU_MINUTES:-12}
dry=${DRY_RUN:-}
fetched=models/fetched/SmolLM2-135M-Instruct.Q4_1.gguf
most_bytes=3000000
binary=${CARGO_TARGET_DIR:-target}/release/depthwise
[ ! -e $prepared/depthwise ] || [ "$device" != cuda ] || binary=$prepared/depthwise
began=
echo "step,result,seconds" > "$results/steps.csv"

# note STEP RESULT SECONDS
note() {
    echo "$1,$2,$3" >> "$results/steps.csv"
    printf '%-28s %s, %s s\n' "$1" "$2" "$3"
}

# passed STEP: whether it has run, and well.
passed() { grep -q "^$1,ok," "$results/steps.csv"; }

# left: seconds that are left of the budget; many without one, and before it begins.
left() {
    if [ "$minutes" = 0 ] || [ -z "$began" ]; then
        echo 1000000
    else
        echo $((60 * minutes - (SECONDS - began)))
    fi
}

# step NAME LIMIT NEEDED COMMAND...: runs a command for at most LIMIT seconds, if the steps that it needs, separated by
# spaces, were well, and the limit fits into what is left.
step() {
    local name=$1 limit=${STEP_SECONDS:-$2} needed=$3 started=$SECONDS status=0 one
    shift 3
    for one in $needed; do
        if grep -q "^$one,skipped: no time" "$results/steps.csv"; then
            note "$name" "skipped: no time for $one" 0
            return
        elif ! passed "$one"; then
            note "$name" "skipped: needs $one" 0
            return
        fi
    done
    if [ "$limit" -gt "$(left)" ]; then
        note "$name" "skipped: no time: $limit s do not fit into the $(left) s left" 0
        return
    fi
    if [ -n "$dry" ]; then
        echo "$name,ok,0" >> "$results/steps.csv"
        printf '%-28s at most %4d s: %s\n' "$name" "$limit" "${*//$results/FOLDER}"
        [ -z "$began" ] || began=$((began - limit))
        return
    fi
    echo "== $name"
    timeout --kill-after=30 "$limit" "$@" > "$results/log/$name.txt" 2>&1 || status=$?
    case $status in
        0) note "$name" ok $((SECONDS - started)) ;;
        124 | 137) note "$name" "failed: stopped after $limit s" $((SECONDS - started)) ;;
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
    [ "$device" = cuda ] && [ -z "$dry" ] || return
    [ -e "$results/machine.csv" ] || echo "when,$fields" > "$results/machine.csv"
    echo "$1,$(ask "$fields" | sed 's/, /,/g')" >> "$results/machine.csv"
}

# name_of_gpu: as h100-80gb-hbm3.
name_of_gpu() {
    local name=$device
    [ "$device" != cuda ] || name=$(ask name)
    echo "${GPU_NAME:-${name:-gpu}}" | tr '[:upper:]' '[:lower:]' |
        sed 's/nvidia//; s/geforce//; s/[^a-z0-9]\+/-/g; s/^-//; s/-$//'
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
    if [ ! -e $prepared/depthwise ]; then
        command -v cargo > /dev/null || lacking+=("Rust: there is no cargo, and no $prepared (gpu.sh --prepare)")
        command -v c++ > /dev/null || lacking+=("a C++ compiler: there is no c++, and no $prepared (gpu.sh --prepare)")
        if [ -z "${CUDA_HOME:-}" ] && ! command -v nvcc > /dev/null && [ ! -e target/cuda-toolkit/.complete-build-13.0.88 ]; then
            python3 -m pip --version > /dev/null || lacking+=("pip, to fetch CUDA from PyPI; or a CUDA toolkit")
        fi
        disk=$(df --output=avail -BG . | tail -n 1 | tr -dc 0-9)
        [ "$disk" -ge 10 ] || lacking+=("10 GB of disk: $disk GB are free")
    fi
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

# Builds the program, or says which one is there already.
build() {
    if [ -e $prepared/depthwise ]; then
        $prepared/depthwise --version
    else
        scripts/cuda-build.sh
    fi
}

# engine_tests TEST...: GPU tests of the engine, all of them of each file but those that measure times. A test that finds no
# GPU says so and passes: here that is a failure.
engine_tests() {
    local log=$results/log/tests-$1-output.txt status=0 test
    local options=(--nocapture --test-threads 1 --skip timing:: --skip bench::)
    for test in "$@"; do
        if [ -e "$prepared/tests/$test" ]; then
            (cd engine && "../$prepared/tests/$test" "${options[@]}") || status=$?
        else
            scripts/cuda-build.sh test --release --package engine --test "$test" -- "${options[@]}" || status=$?
        fi
    done > "$log" 2>&1
    cat "$log"
    if grep -q SKIPPED "$log"; then
        echo "a test found no GPU"
        return 1
    fi
    return "$status"
}

# training_tests: those of the training code.
training_tests() {
    scripts/cuda-build.sh test --release --package training --test gpu -- --nocapture --test-threads 1 2>&1 |
        tee "$results/log/tests-training-output.txt"
    local status=${PIPESTATUS[0]}
    if grep -q SKIPPED "$results/log/tests-training-output.txt"; then
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

# rehearse: copies of the configurations with tiny models and few requests, for the CPU.
rehearse() {
    local file
    mkdir -p "$configs"
    for file in configs/cuda/gemma-2b*.json; do
        sed 's/256000/512/; s/2048/64/; s/16384/96/; s/"head_dim": 256/"head_dim": 16/; s/: 64\(,\|$\)/: 4\1/
            s/"hidden_size": 4,/"hidden_size": 64,/; s/"block_layers": [0-9]*/"block_layers": 2/' "$file" > "$configs/${file##*/}"
    done
    for file in configs/cuda/{chains,gemma-2b,requests}.yaml; do
        sed "s/count: [0-9]*/count: 12/; s/device: cuda/device: cpu/; s/weights: bf16/weights: f32/; s/max_batch: 64/max_batch: 4/
            s/token_budget: [0-9]*/token_budget: 32/; s/max_output_tokens: [0-9]*/max_output_tokens: 12/
            s/min: 32, max: 256/min: 4, max: 16/; s|\.\./\.\./|$root/|; s|\.\./gpu|$root/configs/gpu|" "$file" > "$configs/${file##*/}"
    done
}

# keep MODEL: what is worth keeping of a model, as far as it is there.
keep() {
    [ -z "$dry" ] || return 0
    local folder=$results/profiles/$gpu_name/$1 file
    mkdir -p "$folder"
    for file in profile.yaml latency.csv origin.yaml device.yaml kernels.csv passes.parquet; do
        [ ! -e "$results/profile-$1/$file" ] || cp "$results/profile-$1/$file" "$folder/"
    done
    # The program is not called by its path on this machine.
    [ ! -e "$folder/origin.yaml" ] || sed -i "s|$results|results|g; s|$root/||g" "$folder/origin.yaml"
    [ ! -e "$results/replay-$1/passes.parquet" ] || cp "$results/replay-$1/passes.parquet" "$folder/replay.parquet"
    for file in predictions.csv speedups.csv absolute.csv errors.csv; do
        [ ! -e "$results/validate-$1/$file" ] || cp "$results/validate-$1/$file" "$folder/"
    done
    rmdir "$folder" 2> /dev/null || true
}

# check_size: whether what is worth keeping is small enough to be committed.
check_size() {
    local bytes
    [ ! -e "$results/machine.csv" ] || cp "$results/machine.csv" "$results/profiles/$gpu_name/"
    bytes=$(find "$results/profiles/$gpu_name" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
    echo "$bytes bytes in $results/profiles/$gpu_name"
    if [ "$bytes" -gt $most_bytes ]; then
        echo "expected at most $most_bytes; the largest files:"
        find "$results/profiles/$gpu_name" -type f -printf '%s %P\n' | sort -rn | head -n 5
        return 1
    fi
}

export -f check_machine toolkit_version build engine_tests training_tests profile_larger rehearse check_size ask
export results binary gpu device prepared root most_bytes
configs=configs/cuda
[ "$device" = cuda ] || configs=$results/rehearsal
export configs

if [ "$device" = cuda ]; then
    if [ -z "$dry" ]; then
        step machine 60 "" bash -c check_machine
        if ! passed machine; then
            echo "nothing was built or run: $results"
            exit 1
        fi
        machine before
        busy=$(ask utilization.gpu)
        [ "${busy:-0}" -le 10 ] 2> /dev/null || echo "warning: other work takes $busy% of the GPU: what is measured is too slow"
    fi
    step build 5400 "" bash -c build
    if [ -z "$dry" ]; then
        # The binary needs CUDA's libraries from here on, unless the loader finds them.
        if [ ! -e $prepared/depthwise ] || ldd $prepared/depthwise 2> /dev/null | grep -q 'not found'; then
            set +u
            . scripts/cuda-env.sh > "$results/log/environment.txt" 2>&1
            set -u
        fi
    fi
    weights=bf16 limits=(--max-batch 64 --token-budget 512 --max-tokens 1024 --prefill-chunk 512)
    of_chains=(--max-batch 64 --token-budget 256 --max-tokens 512 --prefill-chunk 256)
    serving=(--max-batch 64 --token-budget 512)
else
    step build 60 "" "$binary" --version
    step rehearse 60 build bash -c rehearse
    weights=f32 limits=(--max-batch 4 --token-budget 32 --max-tokens 64 --prefill-chunk 32)
    of_chains=("${limits[@]}")
    serving=(--max-batch 4 --token-budget 32)
fi
gpu_name=$(name_of_gpu)
export gpu_name
common=(--device "$device" --weights "$weights")
began=$SECONDS

# profile_shape MODEL LIMIT ROUNDS: a latency profile of a shape of Gemma 2B, with random weights.
profile_shape() {
    step "profile-$1" "$2" build "$binary" profile --model "random:$configs/$1.json" "${common[@]}" "${limits[@]}" \
        --rounds "$3" --out "$results/profile-$1"
    keep "$1"
}

# replay_shape MODEL LIMIT EXITS POLICIES: the passes of the same under exits that tokens follow whatever the model computes.
replay_shape() {
    step "replay-$1" "$2" build "$binary" replay --model "random:$configs/$1.json" "${common[@]}" "${serving[@]}" \
        --requests "$configs/requests.yaml" --exits "configs/gpu/exits/$3" --batching sequence,depth --exit "$4" \
        --out "$results/replay-$1"
    keep "$1"
}

[ "$device" != cuda ] || step tests-kernels 60 build bash -c 'engine_tests cuda'
step profile-chains 45 build "$binary" profile --model models/chains "${common[@]}" "${of_chains[@]}" --rounds 3 \
    --out "$results/profile-chains"
keep chains
step replay-chains 30 build "$binary" replay --model models/chains --prompts models/chains/prompts.jsonl --temperature 1 \
    "${common[@]}" --max-batch "${serving[1]}" --token-budget "${of_chains[3]}" --requests "$configs/requests.yaml" \
    --batching sequence,depth --exit none,static:3,gate:0.98 --out "$results/replay-chains"
keep chains
adaptive=none,static:1,oracle:recorded,gate:0.096,margin:0.096
profile_shape gemma-2b-3-loops 75 2
replay_shape gemma-2b-3-loops 75 3-loops $adaptive
profile_shape gemma-2b-vanilla 90 2
replay_shape gemma-2b-vanilla 60 vanilla none
step validate-chains 75 build "$binary" run "$configs/chains.yaml" --out "$results/validate-chains"
keep chains
step validate-gemma-2b-3-loops 90 build "$binary" run "$configs/gemma-2b.yaml" --out "$results/validate-gemma-2b-3-loops"
keep gemma-2b-3-loops
profile_shape gemma-2b-3-loops-rank-0 60 1
replay_shape gemma-2b-3-loops-rank-0 50 3-loops none,oracle:recorded,gate:0.096
minutes=0 step size 10 "" bash -c check_size

# What is left of the time, or all that it takes without a budget.
if [ "$device" = cuda ]; then
    step tests-engine 900 build bash -c 'engine_tests exactness reference profile'
    if [ -n "$dry" ] || command -v cargo > /dev/null; then
        step tests-training 900 build bash -c training_tests
    else
        note tests-training "skipped: there is no cargo" 0
    fi
    step profile-kjv 300 build "$binary" profile --model models/kjv "${common[@]}" --out "$results/profile-kjv"
    step run-kjv 900 build "$binary" run configs/cuda/kjv.yaml --out "$results/run-kjv"
    if [ ! -e "$fetched" ] && [ -e "${DEPTHWISE_MODELS:-}/$(basename "$fetched")" ]; then
        mkdir -p "$(dirname "$fetched")" && ln -s "$(realpath "$DEPTHWISE_MODELS")/$(basename "$fetched")" "$fetched"
    fi
    if [ -e "$fetched" ]; then
        note models ok 0
    else
        step models 600 build env DEPTHWISE_MODELS= scripts/fetch-models.sh
    fi
    step profile-smollm2 600 "build models" "$binary" profile --model "$fetched" --loops 3 "${common[@]}" \
        --max-batch 128 --token-budget 512 --max-tokens 1024 --out "$results/profile-smollm2"
    step run-smollm2 900 "build models" "$binary" run configs/cuda/smollm2.yaml --out "$results/run-smollm2"
    step validate-smollm2 1800 "build models" "$binary" run configs/cuda/validation.yaml --out "$results/validate-smollm2"
    if [ -n "${DEPTHWISE_MODELS:-}" ]; then
        for model in "$DEPTHWISE_MODELS"/*; do
            case $model in
                */"$(basename "$fetched")") continue ;;
                *.gguf) ;;
                *) [ -e "$model/config.json" ] || continue ;;
            esac
            step "profile-$(basename "$model" .gguf)" 900 build bash -c 'profile_larger "$1"' _ "$model"
        done
    fi
fi
machine after
[ ! -e "$results/profiles/$gpu_name" ] || [ ! -e "$results/machine.csv" ] || cp "$results/machine.csv" "$results/profiles/$gpu_name/"

echo
column -s, -t < "$results/steps.csv" 2> /dev/null || cat "$results/steps.csv"
echo "results: $results"
! grep -q ',failed' "$results/steps.csv" && ! grep -q ',skipped: needs' "$results/steps.csv"
