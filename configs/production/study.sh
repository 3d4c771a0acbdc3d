#!/usr/bin/env bash
# Depth-wise batching on production traffic, simulated (docs/notebook/production.md). Fetches measured kernels (PyPI's
# aiconfigurator-core, Apache-2.0), makes latency profiles of them, draws exits, sweeps into results/production, and fills the
# tables and figures of the page.
#   TRACES    folder of the request traces that README.md of this folder names
#   TABLES    the package's folder `systems`, if it is here already; else pip downloads it
#   DEPTHWISE the program (target/release/depthwise)
#   OUT       folder of the results (results/production)
set -euo pipefail
cd "$(dirname "$0")/../.."
DEPTHWISE=${DEPTHWISE:-target/release/depthwise} OUT=${OUT:-results/production}
: "${TRACES:?expected the folder of the request traces, see configs/production/README.md}"
TRACES=$(realpath "$TRACES")
. configs/gpu/tables.sh
here=configs/production

# GPU, its name in the tables, and the version of vLLM whose kernels were measured on it.
while read -r gpu table vllm; do
    while read -r model config loops; do
        for count in $loops; do
            # 64 GB of weights leave no room for keys and values.
            [ "$gpu $model" = "l40s qwen3-32b" ] || [ "$model $count" = "qwen3-32b 1" ] ||
                "$DEPTHWISE" import aiconfigurator "$TABLES" --gpu "$table" --version "$vllm" --model "$config" \
                    --num-loops "$count" --out "$here/profiles/$gpu/$model-$count" </dev/null
        done
    done <<<"qwen3-1.7b $here/qwen3-1.7b.json 1 2 4
qwen3-8b configs/gpu/qwen3-8b.json 1 2 4
qwen3-32b $here/qwen3-32b.json 2 4
ouro-1.4b configs/looped/ouro-1.4b.json 4
ouro-2.6b configs/looped/ouro-2.6b.json 4
nanbeige4.2-3b configs/looped/nanbeige4.2-3b.json 2"
done <<<"h100 h100_sxm 0.24.0
a100 a100_sxm 0.14.0
l40s l40s 0.24.0" >"$scratch/import.log"

# Exits of 2 and of 4 loops by their mean, and the static depths that run as many loops: each request draws one of two.
mkdir -p "$OUT/exits"
while read -r loops mean mix; do
    "$DEPTHWISE" trace draw-exits --loops "$loops" --mean "$mean" --out "$OUT/exits/$loops-$mean"
    echo "$loops $mean $mix" >>"$scratch/means"
done <<<"2 1.25 mix:0:1:0.25
2 1.5 mix:0:1:0.5
2 1.75 mix:0:1:0.75
4 1.5 mix:0:1:0.5
4 2.5 mix:1:2:0.5
4 3.25 mix:2:3:0.25" >"$scratch/exits.log"

# Lines of `systems` for the profiles of one GPU and, beside the middle mean, all others if the second word is `all`.
systems() {
    for profile in "$here/profiles/$1"/*; do
        name=$(basename "$profile") loops=${profile##*-}
        if [ "$loops" = 1 ]; then
            echo "  - {name: $1 ${name%-*} 1 1, profile: $PWD/$profile, exit: [none]}"
            continue
        fi
        while read -r of mean mix; do
            [ "$of" = "$loops" ] || continue
            [ "$2" = all ] || [ "$mean" = 1.5 -a "$of" = 2 ] || [ "$mean" = 2.5 ] || continue
            echo "  - {name: $1 ${name%-*} $loops $mean, profile: $PWD/$profile, exits: $PWD/$OUT/exits/$loops-$mean," \
                "exit: [none, \"gate:0.5\", \"$mix\"]}"
        done <"$scratch/means"
    done
}
{ systems h100 all; systems a100 middle; systems l40s middle; } >"$scratch/systems"
grep 'h100 qwen3-8b 4 2.5' "$scratch/systems" >"$scratch/system"
grep -E 'h100 (qwen3-8b 4 2.5|ouro-1.4b 4 2.5|qwen3-1.7b 2 1.5)' "$scratch/systems" >"$scratch/few"
grep ' 4 2.5' "$scratch/few" >"$scratch/four-loops"

# Sequence-wise, exits wait for the head to the end of an iteration, which is faster there; depth-wise they do not.
wait_of() { [ "$1" = sequence ] && echo 3 || echo 0; }

# Fills a template for a batching policy, and says which file that is.
fill() { # NAME BATCHING TEMPLATE SYSTEMS KEY=VALUE...
    mkdir -p "$OUT/configs"
    local file=$OUT/configs/$1-$2.yaml values=(-e "s|BATCHING|$2|" -e "s|WAIT|$(wait_of "$2")|") value
    for value in "${@:5}"; do values+=(-e "s|${value%%=*}|${value#*=}|"); done
    { sed "${values[@]}" "$here/$3.yaml.in" && echo systems: && cat "$4"; } >"$file"
    echo "$file"
}
# Sweeps a template under both batching policies.
sweep() { # NAME TEMPLATE SYSTEMS KEY=VALUE...
    for batching in sequence depth; do
        "$DEPTHWISE" sweep "$(fill "$1" "$batching" "${@:2}")" --out "$OUT/$1-$batching" --restart
    done
}
# Searches for the capacity under both, with this TPOT at most, in milliseconds.
capacity() { # NAME CONFIG TPOT TEMPLATE SYSTEMS KEY=VALUE...
    for batching in sequence depth; do
        "$DEPTHWISE" capacity "$(fill "$2" "$batching" "${@:4}")" --ttft-ms 5000 --tpot-ms "$3" --out "$OUT/$1-$batching" --restart
    done
}
while read -r name file first caching; do
    traffic=("FILE=$TRACES/$file" "FIRST=$first" "CACHING=$caching" "TITLE=$name")
    sweep "$name" traffic "$scratch/systems" "${traffic[@]}" "CHUNKS=2048" "PREFILL="
    sweep "chunks-$name" traffic "$scratch/few" "${traffic[@]}" "CHUNKS=256, 512, 1024, 2048" "PREFILL="
    # Prompts that run two of four loops; blocks of such prompts are not shared.
    [ "$caching" = true ] && continue
    sweep "prompts-$name" traffic "$scratch/four-loops" "${traffic[@]}" "CHUNKS=2048" "PREFILL=1"
    for prefill in "" 1; do
        to=capacity${prefill:+-prompts}-$name
        capacity "$to" "$to" 50 capacity "$scratch/system" "${traffic[@]}" "PREFILL=$prefill"
    done
done <"$here/traffic.txt"
for history in "256 1024" "1024 512" "4096 160" "16384 48"; do
    set -- $history
    sweep "history-$1" lengths "$scratch/system" "PROMPT=1" "OUTPUT=$((2 * $1))" "COUNT=$2" "BATCHES=1, 2, 4, 8, 16, 32, 64, 128, 256"
done
for prompt in 64 512 4096 16384; do
    for output in 32 128 512 2048; do
        sweep "lengths-$prompt-$output" lengths "$scratch/system" "PROMPT=$prompt" "OUTPUT=$output" "COUNT=400" "BATCHES=64"
    done
done
# Four GPUs that serve whole requests, or of which some run prompts only.
of="profile: $PWD/$here/profiles/h100/qwen3-8b-4, exits: $PWD/$OUT/exits/4-2.5, exit: [none, \"gate:0.5\", \"mix:1:2:0.5\"]"
{
    echo "  - {name: 4 whole, $of}"
    for prompts in 1 2 3; do
        echo "  - {name: $prompts prompt + $((4 - prompts)) decode, $of, machines: [{role: prompt, replicas: $prompts," \
            "batching: sequence}, {role: decode, replicas: $((4 - prompts))}]}"
    done
} >"$scratch/machines"
while read -r name file first; do
    for tpot in 50 15; do
        capacity "machines-$tpot-ms-$name" "machines-$name" "$tpot" machines "$scratch/machines" \
            "FILE=$TRACES/$file" "FIRST=$first" "TITLE=$name"
    done
done <<<"azure-conversation azure-2023-conv.csv 8000
azure-code azure-2023-code.csv 8000
reasoning servegen-reason.csv 3000"
cargo run --quiet --release -p experiments --example production -- "$OUT" "$TRACES" docs/notebook/production.md docs/figures
