#!/usr/bin/env bash
# What a real pretrained model can show of docs/notebook/study.md on two cores: SmolLM2-135M converted to 2 loops.
#   configs/study/smollm2.sh TABLE...     of conversion, uptraining; both without a name
#   conversion  by initialization and rank, before any further training
#   uptraining  the first steps of further training, by initialization, adapters and distillation
# fills the tables of docs/notebook/study.md. It needs what scripts/fetch-models.sh fetches. Ctrl-C stops it, and the
# same command goes on; what is there already is not done again.
#   OUT       folder of the results (results/study-smollm2)
#   MODEL     the model's GGUF file
#   STEPS     of uptraining (the configuration's)
#   DEPTHWISE the program (target/release/depthwise)
#   DOCUMENT  what is filled (docs/notebook/study.md)
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/study-smollm2} DEPTHWISE=${DEPTHWISE:-target/release/depthwise} DOCUMENT=${DOCUMENT:-docs/notebook/study.md}
MODEL=$(realpath "${MODEL:-models/fetched/SmolLM2-135M-Instruct.Q4_1.gguf}")
config=configs/study/smollm2.yaml
STEPS=${STEPS:-$(sed -n 's/^steps: //p' $config)}
mkdir -p "$OUT"

# convert OPTION...: the model in 2 loops, in OUT/model.
convert() {
    rm -rf "$OUT/model"
    "$DEPTHWISE" convert "$MODEL" --loops 2 "$@" --out "$OUT/model" >/dev/null
}

# column NAME FILE: the first and the last value of a column, to three decimals.
column() {
    awk -F, -v name="$1" '
        NR == 1 { for (i = 1; i <= NF; i++) if ($i == name) c = i; next }
        $c != "" { last = $c; if (first == "") first = $c }
        END { printf "%.3f %.3f", first, last }' "$2"
}

# Nats per token of a model's last loop on the text, kept in OUT/NAME.
loss() {
    local name=$1 model=$2 last
    [ -e "$OUT/$name/loops.csv" ] ||
        "$DEPTHWISE" evaluate "$model" --text "$OUT/text.txt" --out "$OUT/$name" >/dev/null
    read -r _ last <<<"$(column loss_nats_per_token "$OUT/$name/loops.csv")"
    echo "$last"
}

# The same of a conversion.
converted() {
    local init=$1 rank=$2 options=()
    [ "$rank" = 0 ] || options=(--rank "$rank")
    [ -e "$OUT/$init-$rank/loops.csv" ] || convert --init "$init" "${options[@]}"
    loss "$init-$rank" "$OUT/model"
}

conversion() {
    local ranks="0 64 256 full"
    head -c 4000 models/kjv/prompts.txt >"$OUT/text.txt"
    echo "| initialization |$(for rank in $ranks; do printf ' rank %s |' "$rank"; done)"
    echo "| --- |$(for _ in $ranks; do printf ' ---: |'; done)"
    for init in stepwise average; do
        echo "| $init |$(for rank in $ranks; do printf ' %s |' "$(converted "$init" "$rank")"; done)"
        echo "$init: done" >&2
    done
    echo
    echo "Nats per token on the first 4,000 bytes of \`models/kjv/prompts.txt\`; the model itself: $(loss original "$MODEL")."
}

# trained NAME CONVERT_OPTIONS TRAIN_OPTIONS: a run in OUT/uptraining/NAME, of which what was measured is kept.
trained() {
    local run=$OUT/uptraining/$1
    [ ! -e "$run/eval.csv" ] || [ -e "$run/training-state.safetensors" ] || return 0
    if [ -e "$run/training-state.safetensors" ]; then
        set -- --resume "$run"
    else
        # shellcheck disable=SC2086 # options are words
        convert $2
        # shellcheck disable=SC2086
        set -- --config $config --from "$OUT/model" --steps "$STEPS" $3 --out "$run"
    fi
    mkdir -p "$run"
    "$DEPTHWISE" train "$@" >>"$run.log" 2>&1
    [ "$(wc -l <"$run/loss.csv")" -gt "$STEPS" ] || exit 130
    rm "$run/training-state.safetensors" "$run/model.safetensors"
}

uptraining() {
    local name converted options first last held_out
    [ -e results/kjv-text/train.txt ] || models/kjv/fetch-text.sh results/kjv-text
    echo "| run | before | last step | held-out text |"
    echo "| --- | ---: | ---: | ---: |"
    while IFS='|' read -r name converted options; do
        trained "$name" "$converted" "$options" </dev/null
        read -r first last <<<"$(column loss_nats_per_token "$OUT/uptraining/$name/loss.csv")"
        read -r _ held_out <<<"$(column loss_nats_per_token "$OUT/uptraining/$name/eval.csv")"
        echo "| $name | $first | $last | $held_out |"
        echo "$name: done" >&2
    done <<END
stepwise|--init stepwise|
average|--init average|
stepwise-svd|--init stepwise --rank 256|
average-svd|--init average --rank 256|
average-zero|--init average --rank 256 --adapters zero|
average-svd-taught|--init average --rank 256|--teacher $MODEL
END
    echo
    echo "Nats per token of the last loop: on the first batch before the first step, on the last batch, and on the first" \
        "$(sed -n 's/^ *held_out_tokens: //p' $config) tokens of the held-out text after $STEPS steps."
}

# Replaces what stands between `<!-- smollm2-TABLE -->` and `<!-- end -->` in the document.
fill() {
    awk -v name="<!-- smollm2-$1 -->" -v file="$OUT/$1.md" '
        $0 == name { print; while ((getline line < file) > 0) print line; inside = 1; next }
        $0 == "<!-- end -->" { inside = 0 }
        !inside { print }' "$DOCUMENT" >"$OUT/document.part"
    mv "$OUT/document.part" "$DOCUMENT"
}

for table in ${*:-conversion uptraining}; do
    "$table" >"$OUT/$table.md"
    fill "$table"
done
rm -rf "$OUT/model"
echo "$DOCUMENT is filled from $OUT" >&2
