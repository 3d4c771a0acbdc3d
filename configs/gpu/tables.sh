# Sourced by the scripts of this folder. Sets `scratch`, a folder that is removed at the end, and `TABLES`, the folder `systems`
# of PyPI's aiconfigurator-core (Apache-2.0), which pip downloads if TABLES is not set.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -z "${TABLES:-}" ]; then
    pip download --quiet --no-deps --dest "$scratch" "aiconfigurator-core==0.12.0"
    python3 -m zipfile -e "$scratch"/*.whl "$scratch"
    TABLES=$scratch/aiconfigurator_core/systems
fi
