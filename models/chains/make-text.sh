#!/usr/bin/env bash
# Writes tasks whose answers take more or fewer steps, a line of twelve chains each:
#   make-text.sh FOLDER  ->  FOLDER/*.txt to train on, FOLDER/held-out.txt, FOLDER/prompts.jsonl
#
# Steps, such as `0-+^=7`: a digit, some symbols and the digit that they lead to. Each of + - * < > ^ stands for a fixed
# permutation of the ten digits, a cycle of four of them; symbols apply from left to right. Permutations do not commute.
# Sums, such as `6317=7`: digits and their sum modulo 10. Only used to train on.
# Digits and symbols are uniform. The random numbers are those of the minimal standard generator (x <- 16807 x mod 2^31 - 1), so
# the files are the same everywhere.
set -euo pipefail
folder=${1:?usage: make-text.sh FOLDER}
mkdir -p "$folder"

# sums SEED LINES LENGTHS: lines of sums, each with one of the LENGTHS.
sums() {
    awk -v seed="$1" -v lines="$2" -v lengths="$3" '
    function draw(bound) { seed = (16807 * seed) % 2147483647; return int(seed / 2147483647 * bound) }
    BEGIN {
        count = split(lengths, sizes)
        for (line = 0; line < lines; line++) {
            for (chain = 1; chain <= 12; chain++) {
                size = sizes[1 + draw(count)]; sum = 0
                for (i = 0; i < size; i++) { digit = draw(10); printf "%d", digit; sum += digit }
                printf "=%d%s", sum % 10, chain < 12 ? " " : "\n"
            }
        }
    }'
}

# steps SEED LINES NUMBERS: lines of steps, each with one of the NUMBERS of symbols. With a fourth argument N: lines of JSON whose
# prompt ends after the `=` of chain N.
steps() {
    awk -v seed="$1" -v lines="$2" -v numbers="$3" -v prompts="${4:-0}" '
    function draw(bound) { seed = (16807 * seed) % 2147483647; return int(seed / 2147483647 * bound) }
    # The permutations are drawn from a seed of their own.
    function permutations(i, j, s, swapped, kept) {
        kept = seed; seed = 123456789
        for (s = 0; s < 6; s++) {
            for (i = 0; i < 10; i++) { to[s, i] = i; digits[i] = i }
            for (i = 0; i < 4; i++) { j = i + draw(10 - i); swapped = digits[i]; digits[i] = digits[j]; digits[j] = swapped }
            for (i = 0; i < 4; i++) to[s, digits[i]] = digits[(i + 1) % 4]
        }
        seed = kept
    }
    BEGIN {
        split("+ - * < > ^", symbols); count = split(numbers, sizes)
        permutations()
        for (line = 0; line < lines; line++) {
            text = ""
            for (c = 1; c <= 12; c++) {
                size = sizes[1 + draw(count)]; state = draw(10); chain = state
                for (i = 0; i < size; i++) { s = draw(6); chain = chain symbols[s + 1]; state = to[s, state] }
                if (c == prompts) {
                    class = size == 1 ? "1 step" : size " steps"
                    printf "{\"prompt\": \"%s%s=\", \"answer\": \"%d\", \"class\": \"%s\"}\n", text, chain, state, class
                    break
                }
                text = text chain "=" state (c < 12 ? " " : "\n")
            }
            if (!prompts) printf "%s", text
        }
    }'
}

sums 1 40000 "1 2 3 4 5 6 7 8" > "$folder/sums-1.txt"
sums 1 80000 "1 1 2 2 2 2 3 3 3 4 4 5 5 6 7 8" > "$folder/sums-2.txt"
head -n 15000 "$folder/sums-2.txt" > "$folder/sums-3.txt"
all="1 1 1 2 2 2 3 3 4 4 5 5 6 6"
steps 16180339 20000 "0 1 1 1 2 2" > "$folder/first-steps.txt"
steps 20410672 60000 "$all" > "$folder/steps.txt"
steps 19990101 1200 "$all" > "$folder/held-out.txt"
steps 27182818 1600 "$all" 5 > "$folder/prompts.jsonl"
wc -c "$folder"/* >&2
