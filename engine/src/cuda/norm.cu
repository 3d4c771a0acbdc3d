// Norms of rows, and of the heads of queries and keys. The residual stream is in f32; inputs of products are not.

// Formula of a norm: x / rms(x) * weight, or (x - mean(x)) / deviation(x) * weight + bias.
struct Formula {
    int width;
    // Number of sets of vectors: one for all depths, or one for each.
    int sets;
    // Whether the mean is subtracted, and the weights of each set are followed by a bias.
    int centred;
    float eps;

    __device__ int numbers() const { return centred ? 2 * width : width; }
};

// Shift and scale of a row.
struct Moments {
    float mean, scale;
};

__device__ inline float normed(float x, const Moments& moments, const Formula& formula, const float* vectors, int at) {
    const float y = (x - moments.mean) * moments.scale * vectors[at];
    return formula.centred ? y + vectors[formula.width + at] : y;
}

template <class T> __device__ inline Moments block_moments(
    const T* x, const Formula& formula, float (&means)[WARPS], float (&squares)[WARPS]) {
    float mean = 0;
    if (formula.centred) {
        float sum = 0;
        for (int at = threadIdx.x; at < formula.width; at += THREADS) {
            sum += to_float(x[at]);
        }
        mean = block_sum(sum, means) / formula.width;
    }
    float sum = 0;
#pragma unroll 8
    for (int at = threadIdx.x; at < formula.width; at += THREADS) {
        const float below = to_float(x[at]) - mean;
        sum += below * below;
    }
    return {mean, rsqrtf(block_sum(sum, squares) / formula.width + formula.eps)};
}

// Norms rows of the residual stream. Grid [rows]: row `i` is row `picks[i]` of `x` [_, width], or `i` without picks.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(
    const float* __restrict__ x, const int* __restrict__ picks, const Row* __restrict__ rows,
    const float* __restrict__ vectors, Formula formula, scalar* __restrict__ out) {
    __shared__ float means[WARPS], squares[WARPS];
    const int row = picks ? picks[blockIdx.x] : int(blockIdx.x);
    if (row < 0 || rows[row].position < 0) {
        return;
    }
    const float* from = x + (long long)row * formula.width;
    vectors += set_of(formula.sets, rows[row].depth) * formula.numbers();
    const Moments moments = block_moments(from, formula, means, squares);
    scalar* to = out + (long long)blockIdx.x * formula.width;
#pragma unroll 8
    for (int at = threadIdx.x; at < formula.width; at += THREADS) {
        store(to + at, normed(from[at], moments, formula, vectors, at));
    }
}

// Adds the normed rows of `x` [rows, width] to those of the residual stream. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) add_normed(
    const scalar* x, const Row* rows, const float* vectors, Formula formula, float* residual) {
    __shared__ float means[WARPS], squares[WARPS];
    const Row row = rows[blockIdx.x];
    if (row.position < 0) {
        return;
    }
    const scalar* from = x + (long long)blockIdx.x * formula.width;
    vectors += set_of(formula.sets, row.depth) * formula.numbers();
    const Moments moments = block_moments(from, formula, means, squares);
    float* to = residual + (long long)blockIdx.x * formula.width;
    for (int at = threadIdx.x; at < formula.width; at += THREADS) {
        to[at] += normed(to_float(from[at]), moments, formula, vectors, at);
    }
}

// Norms rows of the residual stream at `first_depth` and below in place. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) norm_in_place(
    float* x, const Row* rows, const float* vectors, Formula formula, int first_depth) {
    __shared__ float means[WARPS], squares[WARPS];
    const Row row = rows[blockIdx.x];
    if (row.position < 0 || row.depth < first_depth) {
        return;
    }
    x += (long long)blockIdx.x * formula.width;
    vectors += set_of(formula.sets, row.depth) * formula.numbers();
    const Moments moments = block_moments(x, formula, means, squares);
    for (int at = threadIdx.x; at < formula.width; at += THREADS) {
        x[at] = normed(x[at], moments, formula, vectors, at);
    }
}

// Norms each head of queries and keys in place. Grid [rows], a warp per head. A set of `vectors` has those for queries,
// then those for keys; the width is a head's.
extern "C" __global__ void __launch_bounds__(THREADS) norm_heads(
    scalar* qkv, const Row* rows, const float* vectors, Formula formula, int heads, int kv_heads) {
    const Row row = rows[blockIdx.x];
    if (row.position < 0) {
        return;
    }
    const int lane = threadIdx.x % WARP;
    vectors += set_of(formula.sets, row.depth) * 2 * formula.numbers();
    for (int head = threadIdx.x / WARP; head < heads + kv_heads; head += WARPS) {
        scalar* x = qkv + ((long long)blockIdx.x * (heads + 2 * kv_heads) + head) * formula.width;
        const float* own = head < heads ? vectors : vectors + formula.numbers();
        Moments moments = {0, 0};
        if (formula.centred) {
            float sum = 0;
            for (int at = lane; at < formula.width; at += WARP) {
                sum += to_float(x[at]);
            }
            moments.mean = warp_sum(sum) / formula.width;
        }
        float sum = 0;
        for (int at = lane; at < formula.width; at += WARP) {
            const float below = to_float(x[at]) - moments.mean;
            sum += below * below;
        }
        moments.scale = rsqrtf(warp_sum(sum) / formula.width + formula.eps);
        for (int at = lane; at < formula.width; at += WARP) {
            store(x + at, normed(to_float(x[at]), moments, formula, own, at));
        }
    }
}
