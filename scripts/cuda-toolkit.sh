#!/usr/bin/env bash
# cuda-toolkit.sh [compile|build] FOLDER: puts NVIDIA's compiler from PyPI into FOLDER, so that kernels can be compiled,
# and the crate built and linked, where no CUDA is installed. What is there already is not fetched again.
#   compile  what compiles a kernel: NVRTC and ptxas (330 MB)
#   build    also what `cargo build --features cuda` needs: nvcc, cuBLAS, cuRAND, and a libcuda to link against (1.2 GB)
set -euo pipefail
purpose=${1:?compile or build}
folder=$(realpath -m "${2:?where to put it}")
cd "$(dirname "$0")/.."
version=13.0.88

packages=("nvidia-cuda-nvcc==$version" "nvidia-cuda-nvrtc==$version")
case $purpose in
    compile) ;;
    build) packages+=("nvidia-nvvm==$version" "nvidia-cuda-crt==$version" "nvidia-cuda-runtime==13.0.96"
                      "nvidia-cuda-cccl==13.0.85" "nvidia-cublas==13.1.0.3" "nvidia-curand==10.4.0.35") ;;
    *) echo "cuda-toolkit.sh: expected 'compile' or 'build', found '$purpose'" >&2; exit 2 ;;
esac
have="$folder/.complete-$purpose-$version"
if [ -e "$have" ]; then
    exit
fi

echo "fetching CUDA $version for '$purpose' into $folder"
rm -rf "$folder"
mkdir -p "$folder"
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --target "$folder/wheels" "${packages[@]}"
mv "$folder"/wheels/nvidia/cu13/* "$folder"
rm -rf "$folder/wheels"

# The wheels name libraries by version alone; linkers look for the plain name.
for library in "$folder"/lib/lib*.so.*; do
    plain=${library%%.so.*}.so
    [ -e "$plain" ] || ln -s "$(basename "$library")" "$plain"
done
ln -s lib "$folder/lib64"

# libcuda comes with a driver. To link and to start without one, a library with its functions, of which each says that
# it is none (CUDA_ERROR_STUB_LIBRARY). It is in a folder of its own, to be searched last, so that a driver comes first.
if [ "$purpose" = build ]; then
    mkdir -p "$folder/lib/stubs"
    sources=$(cargo metadata --locked --format-version 1 --features depthwise/cuda |
        python3 -c 'import json, os, sys
print(*(os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"))')
    grep -o 'fn cu[A-Z][A-Za-z0-9_]*' "$sources/src/driver/sys/mod.rs" | sort -u |
        sed 's/fn \(.*\)/int \1(void) { return 34; }/' > "$folder/lib/stubs/cuda.c"
    cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$folder/lib/stubs/libcuda.so" "$folder/lib/stubs/cuda.c"
    ln -s libcuda.so "$folder/lib/stubs/libcuda.so.1"
fi
touch "$have" "$folder/.complete-compile-$version"
