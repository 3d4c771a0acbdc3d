#!/usr/bin/env bash
# Fetches the libraries of `depthwise report` again, and checks that they are what this repository holds.
#
#   scripts/report-vendor.sh            compares; needs npm
#   scripts/report-vendor.sh --update   takes what npm has; then look at the page (scripts/report-browser.mjs)
#
# The versions are here and nowhere else.
set -euo pipefail
cd "$(dirname "$0")/../experiments/src/report/vendor"
d3=7.9.2
plot=0.6.17

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Unpacks a package from npm into a folder of the scratch.
fetch() {
    mkdir "$scratch/$2"
    npm pack --silent --pack-destination "$scratch" "$1" > "$scratch/name"
    tar xzf "$scratch/$(tail -n 1 "$scratch/name")" -C "$scratch/$2" --strip-components 1
}
fetch "d3@$d3" d3
fetch "@observablehq/plot@$plot" plot
cp "$scratch/d3/dist/d3.min.js" "$scratch/plot/dist/plot.umd.min.js" "$scratch"
{
    echo "D3 $d3"
    cat "$scratch/d3/LICENSE"
    printf '\nObservable Plot %s\n' "$plot"
    cat "$scratch/plot/LICENSE"
} > "$scratch/LICENCES.txt"
for file in d3.min.js plot.umd.min.js LICENCES.txt; do
    if [ "${1:-}" = --update ]; then
        cp "$scratch/$file" "$file"
    elif ! cmp "$scratch/$file" "$file"; then
        echo "$file: differs from what npm has of these versions" >&2
        exit 1
    fi
    sha256sum "$file"
done
