# . scripts/cuda-env.sh: where CUDA is, for what builds and runs with the feature `cuda`. Where none is installed it is
# PyPI's, fetched into target/cuda-toolkit once.
#   CUDA_HOME         a CUDA toolkit that is installed
#   CUDA_COMPUTE_CAP  the architecture of candle's kernels, as in 80 or 90; 80, which later GPUs run too, if not set
cuda_toolkit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/target/cuda-toolkit
if [ -z "${CUDA_HOME:-}" ]; then
    if command -v nvcc > /dev/null; then
        CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")
    else
        "$(dirname "${BASH_SOURCE[0]}")/cuda-toolkit.sh" build "$cuda_toolkit"
        CUDA_HOME=$cuda_toolkit
    fi
fi
export CUDA_HOME
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
case ":$PATH:" in *":$CUDA_HOME/bin:"*) ;; *) export PATH="$CUDA_HOME/bin:$PATH" ;; esac

# Libraries that a linker searches, and then the loader. A driver's libcuda must be found before one that is none.
cuda_libraries=
for cuda_folder in "$CUDA_HOME/lib64" "$CUDA_HOME/lib"; do
    [ -e "$cuda_folder/libcudart.so" ] && cuda_libraries=$cuda_folder && break
done
export LIBRARY_PATH="$cuda_libraries:$cuda_libraries/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}"
LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$cuda_libraries"
if ! ldconfig -p 2> /dev/null | grep -q 'libcuda\.so\.1'; then
    LD_LIBRARY_PATH+=":$cuda_libraries/stubs"
fi
export LD_LIBRARY_PATH
unset cuda_toolkit cuda_libraries cuda_folder
