#!/usr/bin/env bash
# Writes the King James Bible (public domain) of the Debian package bible-kjv-text as plain text:
#   fetch-text.sh FOLDER  ->  FOLDER/train.txt, FOLDER/held-out.txt, FOLDER/prompts.txt
# A chapter is a paragraph headed by its name, a verse is a line. Held out of training are whole
# books: Ruth, Esther, Ecclesiastes, Micah and Romans for validation, John for prompts.
set -euo pipefail
folder=${1:?usage: fetch-text.sh FOLDER}
command -v bible >/dev/null || apt-get install -y bible-kjv bible-kjv-text >&2
mkdir -p "$folder"

# "Ge1:1 In the beginning ..." -> a heading "Genesis 1" per chapter, then the bare verses.
bible -f gen1:1-rev22:21 | awk -v folder="$folder" '
BEGIN {
    split("Ruth Est Eccl Mic Rom", validation)
    for (i in validation) held_out[validation[i]] = "held-out.txt"
    held_out["John"] = "prompts.txt"
}
{
    place = $1
    verse = substr($0, length(place) + 2)
    match(place, /[0-9]+:[0-9]+$/)
    book = substr(place, 1, RSTART - 1)
    chapter = substr(place, RSTART, index(substr(place, RSTART), ":") - 1)
    if (book " " chapter != last) {
        file = folder "/" (book in held_out ? held_out[book] : "train.txt")
        printf "%s%s %s\n", (file in seen ? "\n" : ""), book, chapter > file
        seen[file] = 1
        last = book " " chapter
    }
    print verse > file
}'
wc -c "$folder"/*.txt >&2
