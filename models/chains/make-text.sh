#!/usr/bin/env bash
# Writes chains of steps, a line of twelve each, to train on and to ask for:
#   make-text.sh FOLDER  ->  FOLDER/{first-steps,steps,held-out}.txt, FOLDER/prompts.jsonl
#
# A chain such as `^>-7=2` is some symbols, a digit, and the digit that they lead to. Each of + - * < > ^ stands for a fixed
# permutation of the ten digits, a cycle of four of them. The symbol next to the digit applies first. Permutations do not commute.
# Digits and symbols are uniform. The random numbers are those of the minimal standard generator (x <- 16807 x mod 2^31 - 1), so
# the files are the same everywhere.
set -euo pipefail
folder=${1:?usage: make-text.sh FOLDER}
mkdir -p "$folder"

# steps SEED LINES NUMBERS: lines of chains, each with one of the NUMBERS of symbols. With a fourth argument N: lines of JSON whose
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
                for (i = 0; i < size; i++) { s = draw(6); chain = symbols[s + 1] chain; state = to[s, state] }
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

steps 16180339 20000 "0 1 1 1 2 2" > "$folder/first-steps.txt"
steps 20410672 30000 "1 2 3 4 5 6" > "$folder/steps.txt"
steps 19990101 600 "1 2 3 4 5 6" > "$folder/held-out.txt"
steps 27182818 1600 "1 2 3 4 5 6" 2 > "$folder/prompts.jsonl"
wc -c "$folder"/* >&2
