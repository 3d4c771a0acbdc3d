// Operations on separate rows: gathering and scattering, biases, activation functions, comparisons and gates.

// The residual stream of rows that enter the block, `out` [rows, width]: source `s >= 0` is token `s` of the embedding
// times `factor`, `s < 0` is row `-1 - s` of those in flight. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) enter_rows(
    const scalar* __restrict__ embedding, const float* __restrict__ in_flight, const int* __restrict__ sources, int width,
    float factor, float* __restrict__ out) {
    const int source = sources[blockIdx.x];
    float* to = out + (long long)blockIdx.x * width;
#pragma unroll 4
    for (int at = threadIdx.x; at < width; at += THREADS) {
        to[at] = source >= 0 ? to_float(embedding[(long long)source * width + at]) * factor
                             : in_flight[(long long)(-1 - source) * width + at];
    }
}

// Copies row `i` of `rows` to row `places[i]` of `target`, both [_, width]; rows without a place (-1) are not copied.
// Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) keep_rows(
    const float* __restrict__ rows, const int* __restrict__ places, int width, float* __restrict__ target) {
    const int place = places[blockIdx.x];
    if (place < 0) {
        return;
    }
#pragma unroll 4
    for (int at = threadIdx.x; at < width; at += THREADS) {
        target[(long long)place * width + at] = rows[(long long)blockIdx.x * width + at];
    }
}

// Inputs of the adapter for rows that enter the block, `out` [rows, 2 width]: a row's state, then its residual stream
// after the prelude, from `injected` [rows, width]. The state of source `s < 0` is row `-1 - s` of those in flight, that
// of a token is the initial state of its position, from `initial` [states, width]. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) inject_rows(
    const float* __restrict__ in_flight, const int* __restrict__ sources, const Row* __restrict__ rows,
    const float* __restrict__ initial, int states, const float* __restrict__ injected, int width,
    scalar* __restrict__ out) {
    const int source = sources[blockIdx.x];
    const float* state = source < 0 ? in_flight + (long long)(-1 - source) * width
                                    : initial + (long long)(rows[blockIdx.x].position % states) * width;
    injected += (long long)blockIdx.x * width;
    out += (long long)blockIdx.x * 2 * width;
#pragma unroll 4
    for (int at = threadIdx.x; at < width; at += THREADS) {
        store(out + at, state[at]);
        store(out + width + at, injected[at]);
    }
}

template <class T> __device__ inline void add_bias(T* x, const Row* rows, const float* biases, int sets, int width) {
    const Row row = rows[blockIdx.x];
    if (row.position < 0) {
        return;
    }
    biases += set_of(sets, row.depth) * width;
    x += (long long)blockIdx.x * width;
    for (int at = threadIdx.x; at < width; at += THREADS) {
        store(x + at, to_float(x[at]) + biases[at]);
    }
}

// Adds a bias to each row of `x` [rows, width]. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) add_bias_to_rows(
    scalar* x, const Row* rows, const float* biases, int sets, int width) {
    add_bias(x, rows, biases, sets, width);
}

extern "C" __global__ void __launch_bounds__(THREADS) add_bias_to_residual(
    float* x, const Row* rows, const float* biases, int sets, int width) {
    add_bias(x, rows, biases, sets, width);
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

__device__ inline float activated(float x, int activation) {
    if (activation == SILU) {
        return x / (1.0f + expf(-x));
    }
    if (activation == GELU) {
        return 0.5f * x * erfcf(-0.707106781f * x);
    }
    return x / (1.0f + expf(-1.59576912f * (x + 0.044715f * x * x * x)));
}

// `activation(gate) * up` of `x` [rows, 2 inner], gates first; or, without gates, `activation(x)` of [rows, inner].
// Grid [rows, parts of a row]; a thread processes a pack.
extern "C" __global__ void __launch_bounds__(THREADS) activate(
    const scalar* x, int inner, int gated, int activation, scalar* out) {
    constexpr int SIZE = Pack<scalar>::SIZE;
    const int at = (blockIdx.y * THREADS + threadIdx.x) * SIZE;
    const scalar* gates = x + (long long)blockIdx.x * inner * (gated ? 2 : 1) + at;
    scalar* to = out + (long long)blockIdx.x * inner + at;
    // Rows are not aligned if their width is not a whole number of packs.
    if (inner % SIZE == 0 && at < inner) {
        Pack<scalar> result = load_pack(gates), ups = gated ? load_pack(gates + inner) : result;
        for (int i = 0; i < SIZE; i++) {
            const float y = activated(to_float(result.numbers[i]), activation);
            store(&result.numbers[i], gated ? y * to_float(ups.numbers[i]) : y);
        }
        store_pack(to, result);
    } else {
        for (int i = 0; i < SIZE && at + i < inner; i++) {
            const float y = activated(to_float(gates[i]), activation);
            store(to + i, gated ? y * to_float(gates[inner + i]) : y);
        }
    }
}

// Row `froms[i]` of `before` and row `tos[i]` of `after`, both [_, width]: their cosine, 0 where a row is zero, and the
// length of their difference relative to that of the second, 1 where that is zero. `out` [pairs, 2]. Grid [pairs].
extern "C" __global__ void __launch_bounds__(THREADS) compare(
    const float* before, const float* after, const int* froms, const int* tos, int width, float* out) {
    __shared__ float of_before[WARPS], of_after[WARPS], of_both[WARPS], of_difference[WARPS];
    const int to = tos[blockIdx.x];
    if (to < 0) {
        return;
    }
    const float* x = before + (long long)froms[blockIdx.x] * width;
    const float* y = after + (long long)to * width;
    float xx = 0, yy = 0, xy = 0, dd = 0;
    for (int at = threadIdx.x; at < width; at += THREADS) {
        const float difference = y[at] - x[at];
        xx += x[at] * x[at];
        yy += y[at] * y[at];
        xy += x[at] * y[at];
        dd += difference * difference;
    }
    xx = block_sum(xx, of_before);
    yy = block_sum(yy, of_after);
    xy = block_sum(xy, of_both);
    dd = block_sum(dd, of_difference);
    const float norms = sqrtf(xx * yy);
    if (threadIdx.x == 0) {
        out[2 * blockIdx.x] = norms > 0 ? xy / norms : 0.0f;
        out[2 * blockIdx.x + 1] = yy > 0 ? sqrtf(dd / yy) : 1.0f;
    }
}

// The learned gate: sigmoid(weight . x + bias) of normed rows `x` [gates, width]. Row `i` is row `picks[i]` of the
// pass; `probes` [depths, width + 1] has one for each depth, its bias last. Grid [gates].
extern "C" __global__ void __launch_bounds__(THREADS) gates(
    const scalar* x, const int* picks, const Row* rows, const float* probes, int width, float* out) {
    __shared__ float sums[WARPS];
    if (picks[blockIdx.x] < 0) {
        return;
    }
    const float* probe = probes + (long long)rows[picks[blockIdx.x]].depth * (width + 1);
    x += (long long)blockIdx.x * width;
    float sum = 0;
    for (int at = threadIdx.x; at < width; at += THREADS) {
        sum += to_float(x[at]) * probe[at];
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = 1.0f / (1.0f + expf(-(sum + probe[width])));
    }
}
