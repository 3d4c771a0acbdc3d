// Exit signals and next tokens, in one sweep over the logits of the head's product.

constexpr int LOGITS_OF_THREAD = 16;
constexpr int SLICE = LOGITS_OF_THREAD * THREADS;   // logits of a slice

// State of part of a row of logits.
struct Sweep {
    float top, second;
    // Sums of exp(logit - top), and of that times (logit - top).
    float sum, weighted;
    // The greatest logit / temperature + noise, and its token.
    double score;
    int token;
};

struct Verdict {
    // Probability of the most likely token (NaN if a logit is not finite), and that less the second's.
    float top1, margin;
    // Entropy of the distribution in nats.
    float entropy;
    float log_sum_exp;
    // The sampled token.
    int token;
};

__device__ inline Sweep nothing_swept() {
    const double lowest = NEGATIVE_INFINITY;
    return {NEGATIVE_INFINITY, NEGATIVE_INFINITY, 0, 0, lowest, 0x7fffffff};
}

// A share of a sum with greatest term `top`, relative to a greater one.
__device__ inline void rescale(float& sum, float& weighted, float top, float greater) {
    if (top == greater || sum == 0) {
        return;
    }
    const float below = top - greater, factor = expf(below);
    weighted = factor * (weighted + sum * below);
    sum *= factor;
}

// The first of tokens with equal scores wins.
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

// Merges the states of a block's threads in the first thread.
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

// What a token is compared by: its logit or, at a temperature, the logit with noise.
__device__ inline double score_of(float logit, int token, float temperature, unsigned long long key) {
    return temperature > 0 ? double(logit / temperature) + gumbel(key, token) : double(logit);
}

// Sweeps `logits` [rows, vocab]. Grid [rows, slices of the vocabulary]; `partial` [rows, slices]. The temperature is in
// memory, so that a graph samples at any.
//
// A thread loads all of its logits before the first use, and takes exponentials relative to their greatest. NaN and
// infinity make the sum NaN.
extern "C" __global__ void __launch_bounds__(THREADS) sweep_logits(
    const float* logits, const unsigned long long* keys, int vocab, const float* temperature, Sweep* partial) {
    __shared__ Sweep of_warps[WARPS];
    const float* row = logits + (long long)blockIdx.x * vocab;
    const int first = blockIdx.y * SLICE + threadIdx.x;
    float of_thread[LOGITS_OF_THREAD];
#pragma unroll
    for (int i = 0; i < LOGITS_OF_THREAD; i++) {
        of_thread[i] = row[min(first + i * THREADS, vocab - 1)];
    }
    const unsigned long long key = keys[blockIdx.x];
    const float heat = *temperature;
    Sweep mine = nothing_swept();
#pragma unroll
    for (int i = 0; i < LOGITS_OF_THREAD; i++) {
        if (first + i * THREADS < vocab) {
            mine.second = fmaxf(mine.second, fminf(mine.top, of_thread[i]));
            mine.top = fmaxf(mine.top, of_thread[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < LOGITS_OF_THREAD; i++) {
        const int token = first + i * THREADS;
        if (token < vocab) {
            const float below = of_thread[i] - mine.top, exponential = expf(below);
            mine.sum += exponential;
            mine.weighted += exponential * below;
            const double score = score_of(of_thread[i], token, heat, key);
            const bool stays = mine.score > score || (mine.score == score && mine.token < token);
            mine.score = stays ? mine.score : score;
            mine.token = stays ? mine.token : token;
        }
    }
    mine = block_joined(mine, of_warps);
    if (threadIdx.x == 0) {
        partial[(long long)blockIdx.x * gridDim.y + blockIdx.y] = mine;
    }
}

// The divergence KL(before, after) of the distributions of two rows of logits: row `froms[i]` of `before`, or the uniform
// distribution if that is negative, and row `tos[i]` of `after`, both [_, vocab]. Grid [pairs].
extern "C" __global__ void __launch_bounds__(THREADS) diverge(
    const float* before, const float* after, const int* froms, const int* tos, int vocab, float* out) {
    __shared__ float top_before[WARPS], top_after[WARPS], sum_before[WARPS], sum_after[WARPS], of_both[WARPS];
    const int from = froms[blockIdx.x];
    const float* q = before + (long long)max(from, 0) * vocab;
    const float* p = after + (long long)tos[blockIdx.x] * vocab;
    float top_q = from < 0 ? 0.0f : NEGATIVE_INFINITY, top_p = NEGATIVE_INFINITY;
    for (int token = threadIdx.x; token < vocab; token += THREADS) {
        top_p = fmaxf(top_p, p[token]);
        top_q = from < 0 ? top_q : fmaxf(top_q, q[token]);
    }
    top_q = block_max(top_q, top_before);
    top_p = block_max(top_p, top_after);
    float sum_q = 0, sum_p = 0, both = 0;
    for (int token = threadIdx.x; token < vocab; token += THREADS) {
        const float of_q = from < 0 ? 0.0f : q[token] - top_q, of_p = p[token] - top_p, weight = expf(of_q);
        sum_q += weight;
        sum_p += expf(of_p);
        both += weight * (of_q - of_p);
    }
    sum_q = block_sum(sum_q, sum_before);
    sum_p = block_sum(sum_p, sum_after);
    both = block_sum(both, of_both);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = fmaxf(both / sum_q + logf(sum_p) - logf(sum_q), 0.0f);
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
