#!/usr/bin/env bash
# Builds, installs and tests the Python package in a new virtual environment, runs the notebooks, and measures.
#
#   scripts/check-python.sh           pip install ./python: builds the wheel and all that it needs
#   scripts/check-python.sh --quick   takes the library of the workspace's own target/release, leaves types and measurements out
#
# PYTHON is the interpreter (default: python3), VENV an environment to use again. Skips, saying so, without Python or PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 10)' 2> /dev/null; then
    echo "SKIPPED: $python is no Python 3.10 or later with venv and pip"
    exit 0
fi
scene=$(mktemp -d)
trap 'rm -rf "$scene"' EXIT
venv=${VENV:-$scene/venv}
[ -d "$venv" ] || "$python" -m venv "$venv"
quick=
[ "${1:-}" != --quick ] || quick=1
packages=(numpy pyarrow pandas polars pytest nbconvert ipykernel matplotlib)
[ -n "$quick" ] || packages+=(mypy)
if ! "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"; then
    echo "SKIPPED: ${packages[*]} could not be installed from PyPI"
    exit 0
fi
if [ -n "$quick" ]; then
    # With the features that tests are built with, so that nothing is built twice.
    cargo build --release --workspace --lib --bins --test sweeps
    mkdir "$scene/lib"
    cp -r python/depthwise "$scene/lib/"
    cp target/release/lib_depthwise.so "$scene/lib/depthwise/_depthwise.abi3.so"
    export PYTHONPATH=$scene/lib
else
    cargo build --release
    "$venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$scene/wheel" ./python
    "$venv/bin/pip" install --quiet --force-reinstall --no-deps "$scene"/wheel/*.whl
    echo "wheel: $(du -k "$scene"/wheel/*.whl | cut -f 1) KiB, $(basename "$scene"/wheel/*.whl)"
fi
export DEPTHWISE=$PWD/target/release/depthwise

"$venv/bin/python" -m pytest -q -p no:cacheprovider python/tests
check_types() {
    printf '[mypy]\ndisable_error_code = import-untyped, import-not-found\n' > "$scene/mypy.ini"
    (cd "$scene" && "$venv/bin/python" -m mypy.stubtest depthwise._depthwise --mypy-config-file mypy.ini \
        && "$venv/bin/python" -m mypy --strict --config-file mypy.ini --cache-dir "$scene/mypy" -p depthwise)
}
for notebook in python/notebooks/*.ipynb; do
    "$venv/bin/python" -m nbconvert --to notebook --execute --log-level ERROR --output-dir "$scene/notebooks" "$notebook"
    echo "ran $notebook"
done
if [ -z "$quick" ]; then
    check_types
    "$venv/bin/python" python/tests/measure.py
fi
echo "Python: all checks passed"
