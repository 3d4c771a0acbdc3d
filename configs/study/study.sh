#!/usr/bin/env bash
# The study of docs/notebook/study.md: the paper's orderings (arXiv 2410.20672, sections 2 and 3) on a small model.
#   configs/study/study.sh TABLE...      of initialization, relaxation, rank, distillation, exits; all without a name
# pretrains the model if it is not there yet, runs what the tables need and is not there yet, and fills the tables of
# docs/notebook/study.md. Ctrl-C stops it; called again, it goes on from the last checkpoints.
#   OUT       folder of the runs (results/study); remove a run's folder to run it anew
#   SEEDS     seeds of the order of the text and of what is random ("1 2 3")
#   JOBS      runs at once (the number of processors)
#   DEPTHWISE the program (target/release/depthwise)
#   DOCUMENT  what is filled (docs/notebook/study.md)
#   PRETRAIN, UPTRAIN  more options of `depthwise train`, such as --steps
set -euo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-results/study} DEPTHWISE=${DEPTHWISE:-target/release/depthwise} PRETRAIN=${PRETRAIN:-} UPTRAIN=${UPTRAIN:-}
SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-$(nproc)} DOCUMENT=${DOCUMENT:-docs/notebook/study.md}
here=configs/study
script=$here/study.sh

# Awk that knows the columns of a CSV file by the names in its first line: column["seed"].
columns='FNR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; next }'

# A field of a run's line in runs.txt: 2 what it starts from, 3 options of convert, 4 options of train.
field() {
    awk -F'|' -v name="$1" -v field="$2" '{ run = $1; gsub(/ /, "", run) }
        run == name { found = 1; gsub(/^ +| +$/, "", $field); print $field }
        END { if (!found) { print "no run `" name "` in runs.txt" > "/dev/stderr"; exit 1 } }' $here/runs.txt
}

runs_of() { sed -n "s/^table $1: //p" $here/tables.txt; }

# The value of a key of a run's description.
described() { sed -n "s/^ *$2: //p" "$1/training.yaml" | head -n 1; }

# Whether a run took all its steps and was evaluated after them.
finished() {
    [ -e "$1/eval.csv" ] && [ "$(wc -l <"$1/loss.csv")" -gt "$(described "$1" steps)" ]
}

# Trains with the options given, from the start or on from a checkpoint.
train() {
    local folder=$1 log
    shift
    if [ -e "$folder/training-state.safetensors" ]; then
        if finished "$folder"; then return 0; fi
        set -- --resume "$folder"
    else
        set -- "$@" --out "$folder"
    fi
    mkdir -p "$OUT/logs"
    log=$OUT/logs/${folder//\//-}.log
    "$DEPTHWISE" train "$@" >>"$log" 2>&1 || { tail -n 3 "$log" >&2; return 1; }
    if ! finished "$folder"; then
        echo "$folder: stopped" >&2
        return 1
    fi
    awk -F, -v folder="$folder" "$columns"' { loss = $column["loss_nats_per_token"] }
        END { printf "%s: %.4f nats per token\n", folder, loss }' "$folder/eval.csv" >&2
}

# One run of one seed.
if [ "${1:-}" = --run ]; then
    name=$2 seed=$3
    folder=$OUT/seed-$seed/$name
    start=$(field "$name" 2) convert=$(field "$name" 3) options=$(field "$name" 4)
    if [ "$start" = vanilla ]; then start=$OUT/vanilla; else start=$OUT/seed-$seed/$start; fi
    if [ -n "$convert" ] && [ ! -e "$OUT/converted/seed-$seed/$name" ]; then
        mkdir -p "$OUT/converted/seed-$seed"
        # shellcheck disable=SC2086 # options are words
        "$DEPTHWISE" convert "$start" $convert --seed "$seed" --out "$OUT/converted/seed-$seed/$name" >/dev/null
    fi
    [ -z "$convert" ] || start=$OUT/converted/seed-$seed/$name
    # shellcheck disable=SC2086
    train "$folder" --config $here/uptrain.yaml --from "$start" --seed "$seed" \
        ${options//VANILLA/$OUT/vanilla} $UPTRAIN
    exit
fi

# Runs the named runs under every seed, those first that others start from.
all_runs() {
    local waiting=$* ready later name start
    while [ -n "$waiting" ]; do
        ready="" later=""
        for name in $waiting; do
            start=$(field "$name" 2)
            if [[ " $waiting " == *" $start "* ]]; then later+="$name "; else ready+="$name "; fi
        done
        for seed in $SEEDS; do for name in $ready; do echo "$name $seed"; done; done |
            xargs -P "$JOBS" -L 1 "$script" --run
        waiting=$(echo $later)
    done
}

# A run and what it starts from.
with_starts() {
    local name=$1
    while [ "$name" != vanilla ]; do
        echo "$name"
        name=$(field "$name" 2)
    done
}

# TABLE.csv: run, seed and what eval.csv says of every loop.
write_csv() {
    echo "run,seed,$(head -n 1 "$OUT/vanilla/eval.csv")"
    awk -F, -v OFS=, 'FNR > 1 { print "vanilla", "-", $0 }' "$OUT/vanilla/eval.csv"
    for name in $(runs_of "$1"); do for seed in $SEEDS; do
        awk -v OFS=, -v run="$name" -v seed="$seed" 'FNR > 1 { print run, seed, $0 }' "$OUT/seed-$seed/$name/eval.csv"
    done; done
}

# The table of a document from TABLE.csv, then what became of its claims.
markdown() {
    echo "| run | seeds | first loop, nats per token | last loop, nats per token | least to most | bits per byte | first agrees with last |"
    echo "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    awk -F, "$columns"' {
            name = $column["run"]; key = name "," $column["seed"]
            if (!(key in loss)) {
                if (!(name in seeds)) order[++runs] = name
                seeds[name]++
                first[name] += $column["loss_nats_per_token"]; agree[name] += $column["agreement_with_last"]
            }
            # Loops follow each other, so what stays is the last.
            loss[key] = $column["loss_nats_per_token"]; bits[key] = $column["bits_per_byte"]; run[key] = name
        }
        END {
            for (key in loss) {
                name = run[key]; sum[name] += loss[key]; bit[name] += bits[key]
                if (!(name in least) || loss[key] < least[name]) least[name] = loss[key]
                if (!(name in most) || loss[key] > most[name]) most[name] = loss[key]
            }
            for (i = 1; i <= runs; i++) {
                name = order[i]; n = seeds[name]
                printf "| %s | %d | %.4f | %.4f | %.4f to %.4f | %.4f | %.1f%% |\n", name, n, first[name] / n,
                    sum[name] / n, least[name], most[name], bit[name] / n, 100 * agree[name] / n
            }
        }' "$1"
    echo
    echo "| the paper | difference by seed, nats per token | here |"
    echo "| --- | --- | --- |"
    # A claim is confirmed if every seed agrees, contradicted if none does.
    awk -v table="$2" '/^table / { current = $2; sub(/:/, "", current) }
        /^claim / && current == table { print $2, $4, ($5 == "+" ? $6 : 0) }' $here/tables.txt |
        while read -r lower higher margin; do
            awk -F, -v lower="$lower" -v higher="$higher" -v margin="$margin" "$columns"' {
                    name = $column["run"]; seed = $column["seed"]
                    loss[name "," seed] = $column["loss_nats_per_token"]
                    if (name == lower && !seen[seed]++) seeds[++n] = seed
                }
                END {
                    for (i = 1; i <= n; i++) {
                        difference = loss[higher "," seeds[i]] - loss[lower "," seeds[i]]
                        list = list (i > 1 ? ", " : "") sprintf("%+.4f", difference)
                        agree += difference + margin > 0
                    }
                    verdict = agree == n ? "confirmed" : agree == 0 ? "contradicted" : "undecided"
                    claim = lower " below " higher (margin > 0 ? " plus " margin : "")
                    printf "| %s | %s | %s |\n", claim, list, verdict
                }' "$1"
        done
}

# Replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the document by a file.
fill() {
    awk -v name="<!-- $1 -->" -v file="$2" '
        $0 == name { print; while ((getline line < file) > 0) print line; inside = 1; next }
        $0 == "<!-- end -->" { inside = 0 }
        !inside { print }' "$DOCUMENT" >"$OUT/document.part"
    mv "$OUT/document.part" "$DOCUMENT"
}

# What the study ran on, from the files of the runs.
setting() {
    local vanilla=$OUT/vanilla first
    first=$(ls -d "$OUT"/seed-*/* | head -n 1)
    echo "- the pretrained model: $(sed -n 's/^\([0-9]*\) of .* parameters trained.*/\1/p' "$OUT/logs/${vanilla//\//-}.log" | head -n 1) parameters"
    echo "- pretraining: $(described "$vanilla" steps) steps of $(described "$vanilla" batch) x $(described "$vanilla" seq) tokens"
    echo "- every other run: $(described "$first" steps) steps of $(described "$first" batch) x $(described "$first" seq) tokens, seeds $SEEDS"
    echo "- held-out text: the first $(described "$first" held_out_tokens) tokens"
    echo "- measured on: $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores"
}

trap 'exit 130' INT
tables=${*:-$(sed -n 's/^table \(.*\):.*/\1/p' $here/tables.txt)}
names=""
for table in $tables; do
    [ -n "$(runs_of "$table")" ] || { echo "no table \`$table\` in tables.txt" >&2; exit 1; }
    for name in $(runs_of "$table"); do for needed in $(with_starts "$name"); do
        [[ " $names " == *" $needed "* ]] || names+="$needed "
    done; done
done
[ -e results/kjv-text/train.txt ] || models/kjv/fetch-text.sh results/kjv-text
# shellcheck disable=SC2086
train "$OUT/vanilla" --config $here/vanilla.yaml $PRETRAIN
all_runs $names
figures=$(dirname "$DOCUMENT")/../figures
mkdir -p "$figures"
for table in $tables; do
    write_csv "$table" >"$OUT/$table.csv"
    curves=() first=${SEEDS%% *}
    for name in $(runs_of "$table"); do curves+=("$OUT/seed-$first/$name"); done
    "$DEPTHWISE" plot "${curves[@]}" --out "$OUT/figures/$table" >/dev/null
    cp "$OUT/figures/$table/loss.png" "$figures/study-$table.png"
    {
        markdown "$OUT/$table.csv" "$table"
        echo
        echo "![Loss curves of seed $first](../figures/study-$table.png)"
    } >"$OUT/$table.md"
    fill "$table" "$OUT/$table.md"
done
setting >"$OUT/setting.md"
fill setting "$OUT/setting.md"
echo "$DOCUMENT is filled from $OUT" >&2
