#!/usr/bin/env bash
# The study of docs/notebook/gpu-study.md: fetches measured kernels (PyPI's aiconfigurator-core, Apache-2.0), makes
# latency profiles of them, simulates, and fills the tables and figures of the page.
#   TABLES    the package's folder `systems`, if it is here already; else pip downloads it
#   OUT       folder of the results (results/gpu)
#   DEPTHWISE the program (target/release/depthwise)
#   DOCUMENT  what is filled (docs/notebook/gpu-study.md)
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/gpu} DEPTHWISE=${DEPTHWISE:-target/release/depthwise} DOCUMENT=${DOCUMENT:-docs/notebook/gpu-study.md}
. configs/gpu/tables.sh

# GPU, its name in the tables, and the version of vLLM whose kernels were measured on it.
gpus="h100 h100_sxm 0.24.0
a100 a100_sxm 0.14.0"

while read -r gpu table vllm; do
    profile() { # NAME MODEL LOOPS RANK [OVERHEAD]
        "$DEPTHWISE" import aiconfigurator "$TABLES" --gpu "$table" --version "$vllm" \
            --model "configs/gpu/$2.json" --num-loops "$3" --lora-rank "$4" --overhead-us "${5:-0}" \
            --out "configs/gpu/profiles/$gpu/$1" </dev/null
    }
    profile gemma-2b-vanilla gemma-2b 1 0
    profile gemma-2b-vanilla-100us gemma-2b 1 0 100
    for loops in 2 3; do for rank in 0 64 512; do
        profile "gemma-2b-$loops-loops-rank-$rank" gemma-2b "$loops" "$rank"
    done; done
    profile gemma-2b-3-loops-rank-64-100us gemma-2b 3 64 100
    profile gemma-2b-32k-vanilla gemma-2b-32k 1 0
    for rank in 0 64; do profile "gemma-2b-32k-3-loops-rank-$rank" gemma-2b-32k 3 "$rank"; done
done <<<"$gpus" >"$scratch/import.log"

# Awk that knows the columns of a CSV file by the names in its first line: column["seed"].
columns='FNR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }'

# Tokens per second and speed-up, a column for each batch limit.
speedups() {
    awk -F, "$columns"' {
            run = $column["system"] " | " $column["batching"] ", " $column["exit_policy"]
            batch = $column["max_batch"]
            if (!(run in depth)) order[++runs] = run
            if (!(batch in seen)) { seen[batch]; batches[++sizes] = batch }
            depth[run] = $column["mean_depth"]; agreement[run] = $column["token_agreement"]
            cell[run, batch] = sprintf("%.0f (%.2fx)", $column["throughput_tok_s"], $column["speedup"])
        }
        END {
            printf "| model | batching, exit | passes | agreement |"
            for (i = 1; i <= sizes; i++) printf " batch %d |", batches[i]
            printf "\n| --- | --- | ---: | ---: |"
            for (i = 1; i <= sizes; i++) printf " ---: |"
            for (r = 1; r <= runs; r++) {
                run = order[r]
                printf "\n| %s | %.3f | %.3f |", run, depth[run], agreement[run]
                for (i = 1; i <= sizes; i++) printf " %s |", cell[run, batches[i]]
            }
            print ""
        }' "$1/summary.csv"
}

# Microseconds of a token by part, up to 64 sequences at once.
parts() {
    awk -F, "$columns"' $column["max_batch"] == 64 {
            run = $column["system"] " | " $column["batching"] ", " $column["exit_policy"]
            part = $column["part"]
            if (!(run in sum)) order[++runs] = run
            if (!(part in seen)) { seen[part]; names[++parts] = part }
            time[run, part] = $column["us_per_token"]; sum[run] += $column["us_per_token"]
        }
        END {
            printf "| model | batching, exit |"
            for (i = 1; i <= parts; i++) printf " %s |", names[i]
            printf " sum |\n| --- | --- |"
            for (i = 0; i <= parts; i++) printf " ---: |"
            for (r = 1; r <= runs; r++) {
                printf "\n| %s |", order[r]
                for (i = 1; i <= parts; i++) printf " %.1f |", time[order[r], names[i]]
                printf " %.1f |", sum[order[r]]
            }
            print ""
        }' "$1/time_by_part.csv"
}

# What fits into a memory and what comes of it; speed-ups are to vanilla in the same memory, for which `first` is `reuse`.
memory() {
    awk -F, "$columns"' {
            bytes = $column["device_memory"]; vanilla = $column["system"] == "vanilla"
            if (vanilla && $column["kv_fill"] == "reuse") base[bytes] = $column["throughput_tok_s"]
            if (vanilla && $column["kv_fill"] != "reuse") next
            rows[bytes]++; row = bytes SUBSEP rows[bytes]
            if (!(bytes in seen)) { seen[bytes]; memories[++count] = bytes }
            start[row] = sprintf("| %d GB | %s | %s | %.1f GB | %d | %d |", bytes / 1e9, $column["system"],
                $column["kv_fill"], $column["weight_bytes"] / 1e9, $column["kv_tokens"], $column["batch_fits"])
            speed[row] = $column["throughput_tok_s"]
            end[row] = sprintf(" %.0f | %.0f |", $column["mean_running"], $column["preemptions"])
        }
        END {
            print "| memory | model | KV fill | weights | tokens that fit | requests that fit | tok/s | ran at once | preemptions |"
            print "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
            for (m = 1; m <= count; m++) for (r = 1; r <= rows[memories[m]]; r++) {
                row = memories[m] SUBSEP r
                print start[row] sprintf(" %.0f (%.2fx) |", speed[row], speed[row] / base[memories[m]]) end[row]
            }
        }' "$1/sweep-summary.csv"
}

# Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the document by a file.
fill() {
    awk -v name="<!-- $1 -->" -v file="$2" '
        $0 == name { print; while ((getline line < file) > 0) print line; inside = 1; next }
        $0 == "<!-- end -->" { inside = 0 }
        !inside { print }' "$DOCUMENT" >"$scratch/document"
    cp "$scratch/document" "$DOCUMENT"
}

for experiment in h100 h100-exits a100 a100-exits; do
    "$DEPTHWISE" run "configs/gpu/$experiment.yaml" --out "$OUT/$experiment"
    speedups "$OUT/$experiment" >"$scratch/table"
    fill "$experiment" "$scratch/table"
    parts "$OUT/$experiment" >"$scratch/table"
    fill "$experiment-parts" "$scratch/table"
    cp "$OUT/$experiment/figures/time-by-part-64.png" "$(dirname "$DOCUMENT")/../figures/gpu-$experiment.png"
done

"$DEPTHWISE" sweep configs/gpu/memory.yaml --out "$OUT/memory" --restart
memory "$OUT/memory" >"$scratch/table"
fill memory "$scratch/table"
