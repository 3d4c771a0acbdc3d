// How sure the model is: exit signals and the next token, in one sweep over the logits as the head's product leaves
// them.

constexpr int SLICE = 16 * THREADS;   // logits of a slice

// What is known of part of a row of logits.
struct Sweep {
    float top, second;
    // Of exp(logit - top), and of that times (logit - top).
    float sum, weighted;
    // The greatest of logit / temperature + noise, and the token that has it.
    double score;
    int token;
};

struct Verdict {
    // Probability of the most likely token (not a number if a logit is not finite), and that less the second's.
    float top1, margin;
    // Of the distribution, in nats.
    float entropy;
    float log_sum_exp;
    // The token drawn.
    int token;
};

__device__ inline Sweep nothing_swept() {
    const double lowest = NEGATIVE_INFINITY;
    return {NEGATIVE_INFINITY, NEGATIVE_INFINITY, 0, 0, lowest, 0x7fffffff};
}

// A share of a sum, of a greatest term `top`, in terms of a greater one.
__device__ inline void rescale(float& sum, float& weighted, float top, float greater) {
    if (top == greater || sum == 0) {
        return;
    }
    const float below = top - greater, factor = expf(below);
    weighted = factor * (weighted + sum * below);
    sum *= factor;
}

// Of equal scores the first token wins.
__device__ inline Sweep joined(Sweep a, Sweep b) {
    const float top = fmaxf(a.top, b.top);
    rescale(a.sum, a.weighted, a.top, top);
    rescale(b.sum, b.weighted, b.top, top);
    const bool first = a.score > b.score || (a.score == b.score && a.token < b.token);
    return {top, fmaxf(fminf(a.top, b.top), fmaxf(a.second, b.second)), a.sum + b.sum, a.weighted + b.weighted,
            first ? a.score : b.score, first ? a.token : b.token};
}

__device__ inline Sweep shuffled(const Sweep& a, int step) {
    return {__shfl_xor_sync(FULL_WARP, a.top, step), __shfl_xor_sync(FULL_WARP, a.second, step),
            __shfl_xor_sync(FULL_WARP, a.sum, step), __shfl_xor_sync(FULL_WARP, a.weighted, step),
            __shfl_xor_sync(FULL_WARP, a.score, step), __shfl_xor_sync(FULL_WARP, a.token, step)};
}

// What the threads of a block have swept, in the first of them.
__device__ inline Sweep block_joined(Sweep mine, Sweep (&of_warps)[WARPS]) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        mine = joined(mine, shuffled(mine, step));
    }
    if (threadIdx.x % WARP == 0) {
        of_warps[threadIdx.x / WARP] = mine;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; warp++) {
            mine = joined(mine, of_warps[warp]);
        }
    }
    return mine;
}

// A bijection that scatters neighbours (the finalizer of SplitMix64, after a step).
__device__ inline unsigned long long mix(unsigned long long number) {
    unsigned long long z = number + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Standard Gumbel noise of a token under a key.
__device__ inline double gumbel(unsigned long long key, unsigned long long token) {
    const double uniform = (double(mix(key ^ mix(token)) >> 11) + 0.5) / double(1ull << 53);
    return -log(-log(uniform));
}

__device__ inline Sweep swept(float logit, int token, float temperature, unsigned long long key) {
    double score = logit;
    if (temperature > 0) {
        score = double(logit / temperature) + gumbel(key, token);
    }
    // What is no number must show in the sum.
    const float one = logit == logit ? 1.0f : logit;
    return {logit, NEGATIVE_INFINITY, one, 0, score, token};
}

// Sweeps `logits` [rows, vocab]. Grid [rows, slices of the vocabulary]; `partial` [rows, slices].
extern "C" __global__ void __launch_bounds__(THREADS) sweep_logits(
    const float* logits, const unsigned long long* keys, int vocab, float temperature, Sweep* partial) {
    __shared__ Sweep of_warps[WARPS];
    const float* row = logits + (long long)blockIdx.x * vocab;
    const int end = min(vocab, int(blockIdx.y + 1) * SLICE);
    Sweep mine = nothing_swept();
    for (int token = blockIdx.y * SLICE + threadIdx.x; token < end; token += THREADS) {
        mine = joined(mine, swept(row[token], token, temperature, keys[blockIdx.x]));
    }
    mine = block_joined(mine, of_warps);
    if (threadIdx.x == 0) {
        partial[(long long)blockIdx.x * gridDim.y + blockIdx.y] = mine;
    }
}

constexpr int HEAD_ROWS = 64;      // rows at most
constexpr int TOKENS_OF_WARP = 32;
constexpr int HEAD_TOKENS = WARPS * TOKENS_OF_WARP;
constexpr int HEAD_STEP = 32;      // inputs of a step

// The head's product and the sweep in one: no logit is written. `x` [rows, inputs], `head` [vocab, inputs], in 16 bits, of
// a multiple of 8 inputs; up to HEAD_ROWS rows, for which reading the head is what takes the time: it is read once,
// from where it lies into the registers of the lanes that multiply with it. Grid [slices of HEAD_TOKENS]; `partial`
// [rows, slices].
//
// The sums of tensor cores do not care which of the inputs a lane calls which, as long as head and rows agree: so of
// every step a lane takes 8 inputs that follow each other, one load, for two products of 16.
extern "C" __global__ void __launch_bounds__(THREADS) sweep_head(
    const scalar* x, const scalar* head, const unsigned long long* keys, int rows, int inputs, int vocab,
    float temperature, Sweep* partial) {
    __shared__ Sweep of_warps[WARPS][HEAD_ROWS];
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    const int first = blockIdx.x * HEAD_TOKENS + warp * TOKENS_OF_WARP + group;
    const auto load = [&](const scalar* matrix, int row, int end, int step) {
        const int input = step + 8 * quarter;
        return row < end && input < inputs ? *reinterpret_cast<const uint4*>(matrix + (long long)row * inputs + input)
                                           : make_uint4(0, 0, 0, 0);
    };

    float sums[2][HEAD_ROWS / 8][4] = {};
    uint4 next[2][2];
    const auto load_next = [&](int step) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                next[tile][half] = load(head, first + 16 * tile + 8 * half, vocab, step);
            }
        }
    };
    load_next(0);
    for (int step = 0; step < inputs; step += HEAD_STEP) {
        uint4 weights[2][2];
#pragma unroll
        for (int of_four = 0; of_four < 4; of_four++) {
            weights[of_four / 2][of_four % 2] = next[of_four / 2][of_four % 2];
        }
        load_next(step + HEAD_STEP);
#pragma unroll
        for (int n = 0; n < HEAD_ROWS / 8; n++) {
            if (8 * n < rows) {
                const uint4 b = load(x, 8 * n + group, rows, step);
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const uint4 upper = weights[tile][0], lower = weights[tile][1];
                    multiply_tiles(scalar(), sums[tile][n], {upper.x, lower.x, upper.y, lower.y}, {b.x, b.y});
                    multiply_tiles(scalar(), sums[tile][n], {upper.z, lower.z, upper.w, lower.w}, {b.z, b.w});
                }
            }
        }
    }

#pragma unroll
    for (int n = 0; n < HEAD_ROWS / 8; n++) {
#pragma unroll
        for (int of_pair = 0; of_pair < 2; of_pair++) {
            const int row = 8 * n + 2 * quarter + of_pair;
            if (8 * n >= rows) {
                continue;
            }
            Sweep mine = nothing_swept();
#pragma unroll
            for (int of_four = 0; of_four < 4; of_four++) {
                const int token = first + 8 * of_four;
                if (row < rows && token < vocab) {
                    const float logit = sums[of_four / 2][n][of_four % 2 * 2 + of_pair];
                    mine = joined(mine, swept(logit, token, temperature, keys[row]));
                }
            }
            for (int step = 4; step < WARP; step *= 2) {
                mine = joined(mine, shuffled(mine, step));
            }
            if (group == 0 && row < rows) {
                of_warps[warp][row] = mine;
            }
        }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        Sweep all = of_warps[0][row];
        for (int other = 1; other < WARPS; other++) {
            all = joined(all, of_warps[other][row]);
        }
        partial[(long long)row * gridDim.x + blockIdx.x] = all;
    }
}

// Joins the slices of each row. Grid [rows].
extern "C" __global__ void __launch_bounds__(THREADS) judge_rows(const Sweep* partial, int slices, Verdict* out) {
    __shared__ Sweep of_warps[WARPS];
    Sweep mine = nothing_swept();
    for (int slice = threadIdx.x; slice < slices; slice += THREADS) {
        mine = joined(mine, partial[(long long)blockIdx.x * slices + slice]);
    }
    mine = block_joined(mine, of_warps);
    if (threadIdx.x == 0) {
        const bool finite = mine.top - mine.top == 0;
        const float top1 = finite ? 1.0f / mine.sum : NOT_A_NUMBER;
        const float log_sum = logf(mine.sum);
        out[blockIdx.x] = {top1, top1 - expf(mine.second - mine.top) * top1,
                           fmaxf(log_sum - mine.weighted / mine.sum, 0.0f), mine.top + log_sum, mine.token};
    }
}
