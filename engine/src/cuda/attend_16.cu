// Attention in 16-bit numbers on tensor cores: a warp processes 16 keys at a time. The scores are queries times keys.
// The output is accumulated transposed, as values times weights, since a lane then has the weights in the tensor core's
// layout. As in FlashAttention-2 (arXiv 2307.08691), intermediate results stay in registers.
//
// Sums of tensor cores do not depend on the order of the numbers, if both factors have the same order. A lane therefore
// takes 8 adjacent numbers, one load, where PTX's layout has pairs from four places.

constexpr int KEYS_OF_TILE = 16;
constexpr int KEYS_OF_STEP = WARPS * KEYS_OF_TILE;
constexpr int SCORE_STEPS = (HEAD_DIM + 31) / 32;    // numbers of a head are multiplied 32 at a time,
constexpr int VALUE_STEPS = (HEAD_DIM + 63) / 64;    // and mixed 64 at a time
// Beyond the head, queries are zero. 16 more bytes, so that lanes that read different queries use different banks.
constexpr int QUERY_STRIDE = 32 * SCORE_STEPS + 8;
constexpr int MIXED_STRIDE = HEAD_DIM + 1;
constexpr int PACK = Pack<scalar>::SIZE;
constexpr int PACKS_OF_QUERY = QUERY_STRIDE / PACK;
static_assert(BLOCK_TOKENS % KEYS_OF_TILE == 0, "the keys of a tile are of one page");
static_assert(SPLIT % KEYS_OF_STEP == 0, "splits are whole steps");

// Online softmax: a lane's state for queries in OCTETS of eight. Lane 4 g + t has query g of each octet and, of the
// outputs, those of queries 2 t and 2 t + 1.
template <int OCTETS> struct Seen {
    float top[OCTETS], sum[OCTETS];
    float mixed[OCTETS][VALUE_STEPS][4][4];
};

// Results that the warps of a block exchange.
template <int OCTETS> struct OfWarps {
    float tops[WARPS][8 * OCTETS], sums[WARPS][8 * OCTETS];
    float mixed[8 * OCTETS][MIXED_STRIDE];
};

__device__ inline uint4 load_16_bytes(const scalar* from) { return *reinterpret_cast<const uint4*>(from); }

// The numbers of two keys at one index, for a tensor core: from the lower halves of two words, and from the upper.
__device__ inline unsigned lower_halves(unsigned a, unsigned b) { return (a & 0xffff) | (b << 16); }
__device__ inline unsigned upper_halves(unsigned a, unsigned b) { return (a >> 16) | (b & 0xffff0000); }

__device__ inline unsigned pair_of(float a, float b) {
    scalar pair[2];
    store(&pair[0], a);
    store(&pair[1], b);
    return pair[0].bits | (unsigned(pair[1].bits) << 16);
}

// Attention of a block's queries over entries `first` to `end` of a sequence at a depth. Query g of octet o attends to
// those from `first_of[o]` to `end_of[o]`, as in lanes 4 g .. 4 g + 3. `queries` are rotated but not scaled.
template <int OCTETS>
__device__ inline void see(const scalar (*queries)[QUERY_STRIDE], const scalar* pages, const Geometry& g,
                           const int* blocks, int slot, int kv_head, int first, int end, const int (&first_of)[OCTETS],
                           const int (&end_of)[OCTETS], Seen<OCTETS>& seen) {
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
        seen.top[octet] = NEGATIVE_INFINITY;
        seen.sum[octet] = 0;
#pragma unroll
        for (int i = 0; i < VALUE_STEPS * 16; i++) {
            seen.mixed[octet][i / 16][i / 4 % 4][i % 4] = 0;
        }
    }
    int tile = (first / KEYS_OF_TILE + warp) * KEYS_OF_TILE;
    int block = tile < end ? blocks[tile / BLOCK_TOKENS] : 0;
    while (tile < end) {
        const scalar* keys = pages + page_at(g, slot, block) + key_at(kv_head, tile % BLOCK_TOKENS);
        const scalar* values = keys + values_at(g);
        const int here = tile;
        tile += KEYS_OF_STEP;
        block = tile < end ? blocks[tile / BLOCK_TOKENS] : 0;

        // Keys beyond the last belong to the same page; their numbers do not affect the scores of other keys.
        float scores[2][4] = {};
#pragma unroll (OCTETS == 1 ? SCORE_STEPS : 2)
        for (int step = 0; step < SCORE_STEPS; step++) {
            const int at = 32 * step + 8 * quarter;
            const uint4 upper = load_16_bytes(&queries[group][at]);
            const uint4 lower = OCTETS > 1 ? load_16_bytes(&queries[8 * (OCTETS - 1) + group][at]) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const scalar* key = keys + (8 * half + group) * HEAD_DIM + at;
                const uint4 b = at < HEAD_DIM ? load_16_bytes(key) : make_uint4(0, 0, 0, 0);
                multiply_tiles(scalar(), scores[half], {upper.x, lower.x, upper.y, lower.y}, {b.x, b.y});
                multiply_tiles(scalar(), scores[half], {upper.z, lower.z, upper.w, lower.w}, {b.z, b.w});
            }
        }

        unsigned weights[OCTETS][2];
#pragma unroll
        for (int octet = 0; octet < OCTETS; octet++) {
            float logits[2][2], top = seen.top[octet];
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int entry = here + 8 * half + 2 * quarter + i;
                    const bool visible = entry >= first_of[octet] && entry < end_of[octet];
                    logits[half][i] = visible ? scores[half][2 * octet + i] * (g.scale * LOG2_E) : NEGATIVE_INFINITY;
                    top = fmaxf(top, logits[half][i]);
                }
            }
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float correction = weight(seen.top[octet], top);
            seen.top[octet] = top;
            seen.sum[octet] *= correction;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float a = weight(logits[half][0], top), b = weight(logits[half][1], top);
                seen.sum[octet] += a + b;
                weights[octet][half] = pair_of(a, b);
            }
            const float of_first = __shfl_sync(FULL_WARP, correction, 8 * quarter);
            const float of_second = __shfl_sync(FULL_WARP, correction, 8 * quarter + 4);
#pragma unroll
            for (int i = 0; i < VALUE_STEPS * 16; i++) {
                seen.mixed[octet][i / 16][i / 4 % 4][i % 4] *= i % 2 ? of_second : of_first;
            }
        }

#pragma unroll
        for (int step = 0; step < VALUE_STEPS; step++) {
            // Keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. A masked value may be NaN, so a weight of 0 would not be enough.
            uint4 of_keys[4];
            const int at = 64 * step + 8 * group;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = 2 * quarter + i % 2 + 8 * (i / 2);
                const bool there = at < HEAD_DIM && here + key >= first && here + key < end;
                of_keys[i] = there ? load_16_bytes(values + key * HEAD_DIM + at) : make_uint4(0, 0, 0, 0);
            }
            const unsigned words[4][4] = {{of_keys[0].x, of_keys[0].y, of_keys[0].z, of_keys[0].w},
                                          {of_keys[1].x, of_keys[1].y, of_keys[1].z, of_keys[1].w},
                                          {of_keys[2].x, of_keys[2].y, of_keys[2].z, of_keys[2].w},
                                          {of_keys[3].x, of_keys[3].y, of_keys[3].z, of_keys[3].w}};
#pragma unroll
            for (int pair = 0; pair < 4; pair++) {
                const unsigned a[4] = {lower_halves(words[0][pair], words[1][pair]),
                                       upper_halves(words[0][pair], words[1][pair]),
                                       lower_halves(words[2][pair], words[3][pair]),
                                       upper_halves(words[2][pair], words[3][pair])};
#pragma unroll
                for (int octet = 0; octet < OCTETS; octet++) {
                    multiply_tiles(scalar(), seen.mixed[octet][step][pair], a, {weights[octet][0], weights[octet][1]});
                }
            }
        }
    }
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
        seen.sum[octet] += __shfl_xor_sync(FULL_WARP, seen.sum[octet], 1);
        seen.sum[octet] += __shfl_xor_sync(FULL_WARP, seen.sum[octet], 2);
    }
}

// The greatest score of a query over all warps.
template <int OCTETS> __device__ inline float top_of(const OfWarps<OCTETS>& warps, int query) {
    float top = NEGATIVE_INFINITY;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        top = fmaxf(top, warps.tops[warp][query]);
    }
    return top;
}

template <int OCTETS> __device__ inline float sum_of(const OfWarps<OCTETS>& warps, int query, float top) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        sum += weight(warps.tops[warp][query], top) * warps.sums[warp][query];
    }
    return sum;
}

// Adds up the outputs of all warps, one after the other.
template <int OCTETS> __device__ inline void join_warps(const Seen<OCTETS>& seen, OfWarps<OCTETS>& warps) {
    const int warp = threadIdx.x / WARP, group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    if (quarter == 0) {
#pragma unroll
        for (int octet = 0; octet < OCTETS; octet++) {
            warps.tops[warp][8 * octet + group] = seen.top[octet];
            warps.sums[warp][8 * octet + group] = seen.sum[octet];
        }
    }
    __syncthreads();
    float shares[OCTETS][2];
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int query = 8 * octet + 2 * quarter + i;
            shares[octet][i] = weight(warps.tops[warp][query], top_of(warps, query));
        }
    }
    for (int turn = 0; turn < WARPS; turn++) {
        if (warp == turn) {
#pragma unroll
            for (int step = 0; step < VALUE_STEPS; step++) {
#pragma unroll
                for (int i = 0; i < OCTETS * 16; i++) {
                    const int octet = i / 16, pair = i / 4 % 4, of_four = i % 4;
                    const int at = 64 * step + 8 * group + 2 * pair + of_four / 2;
                    if (at < HEAD_DIM) {
                        float& mixed = warps.mixed[8 * octet + 2 * quarter + of_four % 2][at];
                        const float mine = shares[octet][of_four % 2] * seen.mixed[octet][step][pair][of_four];
                        mixed = turn == 0 ? mine : mixed + mine;
                    }
                }
            }
        }
        __syncthreads();
    }
}

// Blocks per multiprocessor for which ptxas is to limit registers. Wide heads would take a few more registers than three
// blocks leave them. More blocks than these are not requested: ptxas would spill for them, as on sm_100 for wide heads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr int BLOCKS_OF_SPLITS = HEAD_DIM > 128 ? 3 : 1;
#else
constexpr int BLOCKS_OF_SPLITS = 1;
#endif

// Attention of decode rows over one split of their history. Grid [items, heads / GROUP].
//
// Rows with one split write `out` [rows, heads * HEAD_DIM]. For others, `partial` [splits, heads, 2 + HEAD_DIM] gets the
// greatest score, the sum of weights, and the weighted values.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_OF_SPLITS) attend_splits(
    const scalar* qkv, const scalar* pages, const Row* rows, const Item* items,
    const int* block_table, const Sight* sights, Geometry g, float* partial, scalar* out) {
    __shared__ __align__(16) scalar queries[8][QUERY_STRIDE];
    __shared__ OfWarps<1> warps;

    const Item item = items[blockIdx.x];
    if (item.row < 0) {
        return;
    }
    const Row row = rows[item.row];
    const Sight sight = sights[set_of(g.sights, row.depth)];
    const int start = first_seen(sight, row);
    const int first = max(start, item.split * SPLIT), end = min(row.end, (item.split + 1) * SPLIT);
    if (first >= end) {
        return;
    }
    const int first_head = blockIdx.y * GROUP;
    const int kv_head = first_head / (g.heads / g.kv_heads);
    const scalar* query = qkv + (long long)item.row * (g.heads + 2 * g.kv_heads) * HEAD_DIM + first_head * HEAD_DIM;
    for (int i = threadIdx.x; i < 8 * PACKS_OF_QUERY; i += THREADS) {
        const int head = i / PACKS_OF_QUERY, at = i % PACKS_OF_QUERY * PACK;
        const bool there = head < GROUP && at < HEAD_DIM;
        store_pack(&queries[head][at], there ? load_pack(query + head * HEAD_DIM + at) : zero_pack<scalar>());
    }
    __syncthreads();

    Seen<1> seen;
    see<1>(queries, pages, g, block_table + row.first_block, row.slot, kv_head, first, end, {first}, {end}, seen);
    join_warps(seen, warps);

    const bool whole = start / SPLIT == (row.end - 1) / SPLIT;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int head = i / HEAD_DIM, at = i % HEAD_DIM;
        const float top = top_of(warps, head), sum = sum_of(warps, head, top), mix = warps.mixed[head][at];
        leave_split(whole, item, row, g, first_head + head, at, top, sum, mix, partial, out);
    }
}

// Attention of the rows of prompt chunks. Grid [tiles, heads].
extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_tiles(
    const scalar* qkv, const scalar* pages, const Row* rows, const Tile* tiles,
    const int* block_table, const Sight* sights, Geometry g, scalar* out) {
    __shared__ __align__(16) scalar queries[QUERIES][QUERY_STRIDE];
    __shared__ OfWarps<2> warps;
    static_assert(QUERIES == 16, "two octets of queries");

    const Tile tile = tiles[blockIdx.x];
    if (tile.rows == 0) {
        return;
    }
    const Row row = rows[tile.first_row];
    const Sight sight = sights[set_of(g.sights, row.depth)];
    const int head = blockIdx.y, kv_head = head / (g.heads / g.kv_heads);
    const int width = (g.heads + 2 * g.kv_heads) * HEAD_DIM;
    for (int i = threadIdx.x; i < QUERIES * PACKS_OF_QUERY; i += THREADS) {
        const int query = i / PACKS_OF_QUERY, at = i % PACKS_OF_QUERY * PACK;
        const scalar* from = qkv + (long long)(tile.first_row + query) * width + head * HEAD_DIM + at;
        store_pack(&queries[query][at], query < tile.rows && at < HEAD_DIM ? load_pack(from) : zero_pack<scalar>());
    }
    __syncthreads();

    // Queries beyond the last attend to nothing.
    int first_of[2], end_of[2];
#pragma unroll
    for (int octet = 0; octet < 2; octet++) {
        const int query = 8 * octet + threadIdx.x % WARP / 4;
        const bool there = query < tile.rows;
        first_of[octet] = there ? first_seen(sight, rows[tile.first_row + query]) : 0;
        end_of[octet] = there ? rows[tile.first_row + query].end : 0;
    }
    const int first = first_seen(sight, row), end = rows[tile.first_row + tile.rows - 1].end;
    Seen<2> seen;
    see<2>(queries, pages, g, block_table + row.first_block, row.slot, kv_head, first, end, first_of, end_of, seen);
    join_warps(seen, warps);

    for (int i = threadIdx.x; i < tile.rows * HEAD_DIM; i += THREADS) {
        const int query = i / HEAD_DIM, at = i % HEAD_DIM;
        scalar* to = out + (long long)(tile.first_row + query) * g.heads * HEAD_DIM + head * HEAD_DIM + at;
        store(to, warps.mixed[query][at] / sum_of(warps, query, top_of(warps, query)));
    }
}
