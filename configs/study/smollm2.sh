#!/usr/bin/env bash
# The part of docs/study.md that a real pretrained model can show on two cores: SmolLM2-135M converted to 2 loops, by
# initialization and rank, before any further training. Fills the table of docs/study.md.
#   scripts/fetch-models.sh && configs/study/smollm2.sh
#   OUT       folder of the results (results/study-smollm2); evaluations that are there are not done again
#   MODEL     the model's GGUF file
#   DEPTHWISE the program (target/release/depthwise)
#   DOCUMENT  what is filled (docs/study.md)
set -euo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
OUT=${OUT:-results/study-smollm2} DEPTHWISE=${DEPTHWISE:-target/release/depthwise} DOCUMENT=${DOCUMENT:-docs/study.md}
MODEL=${MODEL:-models/fetched/SmolLM2-135M-Instruct.Q4_1.gguf}
mkdir -p "$OUT"
head -c 4000 models/kjv/prompts.txt >"$OUT/text.txt"

# Nats per token of a model's last loop on the text, kept in OUT/NAME.
loss() {
    local name=$1 model=$2
    [ -e "$OUT/$name/loops.csv" ] ||
        "$DEPTHWISE" evaluate "$model" --text "$OUT/text.txt" --out "$OUT/$name" >/dev/null
    awk -F, 'NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i } END { printf "%.3f", $column["loss_nats_per_token"] }' \
        "$OUT/$name/loops.csv"
}

# The same of a conversion, which is removed after its evaluation.
converted() {
    local init=$1 rank=$2 folder=$OUT/model options=()
    [ "$rank" = 0 ] || options=(--rank "$rank")
    if [ ! -e "$OUT/$init-$rank/loops.csv" ]; then
        rm -rf "$folder"
        "$DEPTHWISE" convert "$MODEL" --loops 2 --init "$init" "${options[@]}" --out "$folder" >/dev/null
    fi
    loss "$init-$rank" "$folder"
}

ranks="0 64 256 full"
{
    echo "| initialization |$(for rank in $ranks; do printf ' rank %s |' "$rank"; done)"
    echo "| --- |$(for _ in $ranks; do printf ' ---: |'; done)"
    for init in stepwise average; do
        echo "| $init |$(for rank in $ranks; do printf ' %s |' "$(converted "$init" "$rank")"; done)"
        echo "$init: done" >&2
    done
    echo
    echo "Nats per token on the first 4,000 bytes of \`models/kjv/prompts.txt\`; the model itself: $(loss original "$MODEL")."
} >"$OUT/table.md"
rm -rf "$OUT/model"
awk -v file="$OUT/table.md" '
    $0 == "<!-- smollm2 -->" { print; while ((getline line < file) > 0) print line; inside = 1; next }
    $0 == "<!-- end -->" { inside = 0 }
    !inside { print }' "$DOCUMENT" >"$OUT/document.part"
mv "$OUT/document.part" "$DOCUMENT"
echo "$DOCUMENT is filled from $OUT" >&2
