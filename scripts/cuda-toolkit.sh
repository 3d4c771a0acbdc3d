#!/usr/bin/env bash
# cuda-toolkit.sh FOLDER: puts what compiles a CUDA kernel, NVRTC and ptxas, into FOLDER. They come from PyPI (330 MB).
set -euo pipefail
folder=${1:?where to put it}
version=13.0.88
if [ -e "$folder/.complete-$version" ]; then
    exit
fi

echo "fetching NVIDIA's compiler $version into $folder"
rm -rf "$folder"
mkdir -p "$folder"
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --target "$folder/wheels" "nvidia-cuda-nvcc==$version" "nvidia-cuda-nvrtc==$version"
mv "$folder"/wheels/nvidia/cu13/* "$folder"
rm -rf "$folder/wheels"
touch "$folder/.complete-$version"
