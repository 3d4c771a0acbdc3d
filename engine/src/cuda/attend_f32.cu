// Attention in 32-bit numbers with multiply-adds: a lane of a warp has part of a key for all query heads that share it.

// How a warp reads keys: LANES lanes per key, a pack each, repeated if the head is wider.
__device__ constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int PACK = Pack<scalar>::SIZE;
constexpr int PACKS_OF_HEAD = HEAD_DIM / PACK;
constexpr int LANES = power_of_two_from(PACKS_OF_HEAD) < WARP ? power_of_two_from(PACKS_OF_HEAD) : WARP;
constexpr int PACKS_OF_LANE = (PACKS_OF_HEAD + LANES - 1) / LANES;
constexpr int KEYS_OF_WARP = WARP / LANES;
// Keys per lane between two corrections of the online softmax (arXiv 1805.02867): the number of loads in flight.
constexpr int KEYS_OF_LANE = 4;
constexpr int KEYS_OF_BLOCK = WARPS * KEYS_OF_WARP * KEYS_OF_LANE;
static_assert(HEAD_DIM % PACK == 0, "a head is read in whole packs");
static_assert(SPLIT % KEYS_OF_BLOCK == 0, "splits are whole steps");

// Online softmax: a lane's state for its part of GROUP heads.
struct Seen {
    float top[GROUP];
    float sum[GROUP];
    float mixed[GROUP][PACKS_OF_LANE][PACK];
};

// Merges the state of the lanes `step` away, which processed other keys.
__device__ inline void join_lanes(Seen& seen, int step) {
    for (int head = 0; head < GROUP; head++) {
        const float other_top = __shfl_xor_sync(FULL_WARP, seen.top[head], step);
        const float top = fmaxf(seen.top[head], other_top);
        const float mine = weight(seen.top[head], top), others = weight(other_top, top);
        seen.top[head] = top;
        seen.sum[head] = seen.sum[head] * mine + __shfl_xor_sync(FULL_WARP, seen.sum[head], step) * others;
        for (int n = 0; n < PACKS_OF_LANE; n++) {
            for (int i = 0; i < PACK; i++) {
                float& mixed = seen.mixed[head][n][i];
                mixed = mixed * mine + __shfl_xor_sync(FULL_WARP, mixed, step) * others;
            }
        }
    }
}

// Attention of decode rows over one split of their history. Grid [items, heads / GROUP].
//
// At least one block per multiprocessor is requested: otherwise ptxas spills for occupancy, narrow heads first.
//
// Rows with one split write `out` [rows, heads * HEAD_DIM]. For others, `partial` [splits, heads, 2 + HEAD_DIM] gets the
// greatest score, the sum of weights, and the weighted values.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_splits(
    const scalar* qkv, const scalar* pages, const Row* rows, const Item* items,
    const int* block_table, const Sight* sights, Geometry g, float* partial, scalar* out) {
    __shared__ float queries[GROUP][HEAD_DIM];
    __shared__ float tops[WARPS][GROUP];
    __shared__ float sums[WARPS][GROUP];
    __shared__ float mixed[WARPS][GROUP][HEAD_DIM];

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
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        queries[i / HEAD_DIM][i % HEAD_DIM] = to_float(query[i]) * (g.scale * LOG2_E);
    }
    __syncthreads();

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int part = lane % LANES, key_of_warp = lane / LANES;
    Seen seen;
    for (int head = 0; head < GROUP; head++) {
        seen.top[head] = NEGATIVE_INFINITY;
        seen.sum[head] = 0;
        for (int n = 0; n < PACKS_OF_LANE; n++) {
            for (int i = 0; i < PACK; i++) {
                seen.mixed[head][n][i] = 0;
            }
        }
    }
    for (int step = first / KEYS_OF_BLOCK * KEYS_OF_BLOCK; step < end; step += KEYS_OF_BLOCK) {
        Pack<scalar> keys[KEYS_OF_LANE][PACKS_OF_LANE], values[KEYS_OF_LANE][PACKS_OF_LANE];
        bool visible[KEYS_OF_LANE];
#pragma unroll
        for (int key = 0; key < KEYS_OF_LANE; key++) {
            const int entry = step + (key * WARPS + warp) * KEYS_OF_WARP + key_of_warp;
            visible[key] = entry >= first && entry < end;
            const int block = visible[key] ? block_table[row.first_block + entry / BLOCK_TOKENS] : 0;
            const scalar* from = pages + page_at(g, row.slot, block) + key_at(kv_head, entry % BLOCK_TOKENS);
#pragma unroll
            for (int n = 0; n < PACKS_OF_LANE; n++) {
                const int pack = part + n * LANES;
                const bool there = visible[key] && pack < PACKS_OF_HEAD;
                keys[key][n] = there ? load_pack(from + pack * PACK) : zero_pack<scalar>();
                values[key][n] = there ? load_pack(from + values_at(g) + pack * PACK) : zero_pack<scalar>();
            }
        }
#pragma unroll
        for (int head = 0; head < GROUP; head++) {
            float scores[KEYS_OF_LANE];
            float top = seen.top[head];
#pragma unroll
            for (int key = 0; key < KEYS_OF_LANE; key++) {
                float score = 0;
#pragma unroll
                for (int n = 0; n < PACKS_OF_LANE; n++) {
                    const int pack = part + n * LANES;
                    if (pack < PACKS_OF_HEAD) {
#pragma unroll
                        for (int i = 0; i < PACK; i++) {
                            score += queries[head][pack * PACK + i] * to_float(keys[key][n].numbers[i]);
                        }
                    }
                }
#pragma unroll
                for (int half = LANES / 2; half > 0; half /= 2) {
                    score += __shfl_xor_sync(FULL_WARP, score, half);
                }
                scores[key] = visible[key] ? score : NEGATIVE_INFINITY;
                top = fmaxf(top, scores[key]);
            }
            const float correction = weight(seen.top[head], top);
            seen.top[head] = top;
            seen.sum[head] *= correction;
#pragma unroll
            for (int n = 0; n < PACKS_OF_LANE; n++) {
#pragma unroll
                for (int i = 0; i < PACK; i++) {
                    seen.mixed[head][n][i] *= correction;
                }
            }
#pragma unroll
            for (int key = 0; key < KEYS_OF_LANE; key++) {
                const float w = weight(scores[key], top);
                seen.sum[head] += w;
#pragma unroll
                for (int n = 0; n < PACKS_OF_LANE; n++) {
#pragma unroll
                    for (int i = 0; i < PACK; i++) {
                        seen.mixed[head][n][i] += w * to_float(values[key][n].numbers[i]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int step = LANES; step < WARP; step *= 2) {
        join_lanes(seen, step);
    }
    if (key_of_warp == 0) {
#pragma unroll
        for (int head = 0; head < GROUP; head++) {
            if (part == 0) {
                tops[warp][head] = seen.top[head];
                sums[warp][head] = seen.sum[head];
            }
#pragma unroll
            for (int n = 0; n < PACKS_OF_LANE; n++) {
                const int pack = part + n * LANES;
                if (pack < PACKS_OF_HEAD) {
#pragma unroll
                    for (int i = 0; i < PACK; i++) {
                        mixed[warp][head][pack * PACK + i] = seen.mixed[head][n][i];
                    }
                }
            }
        }
    }
    __syncthreads();

    const bool whole = start / SPLIT == (row.end - 1) / SPLIT;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int head = i / HEAD_DIM, at = i % HEAD_DIM;
        float top = NEGATIVE_INFINITY;
        for (int w = 0; w < WARPS; w++) {
            top = fmaxf(top, tops[w][head]);
        }
        float sum = 0, mix = 0;
        for (int w = 0; w < WARPS; w++) {
            const float share = weight(tops[w][head], top);
            sum += share * sums[w][head];
            mix += share * mixed[w][head][at];
        }
        leave_split(whole, item, row, g, first_head + head, at, top, sum, mix, partial, out);
    }
}

// Keys per step of a tile: they, their values and the queries are in shared memory.
constexpr int HEAD_BYTES = HEAD_DIM * int(sizeof(scalar));
constexpr int KEYS_OF_STEP = HEAD_BYTES <= 256 ? 32 : HEAD_BYTES <= 512 ? 16 : 8;
constexpr int QUERIES_OF_WARP = QUERIES / WARPS;
// One more pack, so that lanes that read one column of different keys use different banks.
constexpr int KEY_STRIDE = HEAD_DIM + PACK;
constexpr int PAIRS_OF_LANE = (HEAD_DIM + 2 * WARP - 1) / (2 * WARP);

// Attention of the rows of prompt chunks. Grid [tiles, heads].
extern "C" __global__ void __launch_bounds__(THREADS) attend_tiles(
    const scalar* qkv, const scalar* pages, const Row* rows, const Tile* tiles,
    const int* block_table, const Sight* sights, Geometry g, scalar* out) {
    __shared__ __align__(16) float queries[QUERIES][HEAD_DIM];
    __shared__ __align__(16) scalar keys[KEYS_OF_STEP][KEY_STRIDE];
    __shared__ __align__(16) scalar values[KEYS_OF_STEP][HEAD_DIM];
    __shared__ float weights[QUERIES][KEYS_OF_STEP];

    const Tile tile = tiles[blockIdx.x];
    if (tile.rows == 0) {
        return;
    }
    const Row row = rows[tile.first_row];
    const Sight sight = sights[set_of(g.sights, row.depth)];
    const int head = blockIdx.y, kv_head = head / (g.heads / g.kv_heads);
    const int width = (g.heads + 2 * g.kv_heads) * HEAD_DIM;
    for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += THREADS) {
        const int query = i / HEAD_DIM, at = i % HEAD_DIM;
        float x = 0;
        if (query < tile.rows) {
            const scalar* from = qkv + (long long)(tile.first_row + query) * width + head * HEAD_DIM;
            x = to_float(from[at]) * (g.scale * LOG2_E);
        }
        queries[query][at] = x;
    }

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_query = warp * QUERIES_OF_WARP;
    int first_of_query[QUERIES_OF_WARP], end_of_query[QUERIES_OF_WARP];
    float top[QUERIES_OF_WARP], sum[QUERIES_OF_WARP], mixed[QUERIES_OF_WARP][PAIRS_OF_LANE][2];
    for (int query = 0; query < QUERIES_OF_WARP; query++) {
        const bool there = first_query + query < tile.rows;
        first_of_query[query] = there ? first_seen(sight, rows[tile.first_row + first_query + query]) : 0;
        end_of_query[query] = there ? rows[tile.first_row + first_query + query].end : 0;
        top[query] = NEGATIVE_INFINITY;
        sum[query] = 0;
        for (int pair = 0; pair < PAIRS_OF_LANE; pair++) {
            mixed[query][pair][0] = mixed[query][pair][1] = 0;
        }
    }
    const int first = first_seen(sight, row), end = rows[tile.first_row + tile.rows - 1].end;
    for (int step = first / KEYS_OF_STEP * KEYS_OF_STEP; step < end; step += KEYS_OF_STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS_OF_STEP * PACKS_OF_HEAD; i += THREADS) {
            const int key = i / PACKS_OF_HEAD, at = i % PACKS_OF_HEAD * PACK;
            const int entry = step + key;
            const bool there = entry >= first && entry < end;
            const int block = there ? block_table[row.first_block + entry / BLOCK_TOKENS] : 0;
            const scalar* from = pages + page_at(g, row.slot, block) + key_at(kv_head, entry % BLOCK_TOKENS) + at;
            store_pack(&keys[key][at], there ? load_pack(from) : zero_pack<scalar>());
            store_pack(&values[key][at], there ? load_pack(from + values_at(g)) : zero_pack<scalar>());
        }
        __syncthreads();
        if (first_query >= tile.rows) {
            continue;
        }
        float scores[QUERIES_OF_WARP] = {};
        if (lane < KEYS_OF_STEP) {
            for (int at = 0; at < HEAD_DIM; at += PACK) {
                const Pack<scalar> key = load_pack(&keys[lane][at]);
#pragma unroll
                for (int i = 0; i < PACK; i++) {
#pragma unroll
                    for (int query = 0; query < QUERIES_OF_WARP; query++) {
                        scores[query] += queries[first_query + query][at + i] * to_float(key.numbers[i]);
                    }
                }
            }
        }
#pragma unroll
        for (int query = 0; query < QUERIES_OF_WARP; query++) {
            const int entry = step + lane;
            const bool visible =
                lane < KEYS_OF_STEP && entry >= first_of_query[query] && entry < end_of_query[query];
            const float score = visible ? scores[query] : NEGATIVE_INFINITY;
            const float greatest = fmaxf(top[query], warp_max(score));
            const float correction = weight(top[query], greatest), w = weight(score, greatest);
            top[query] = greatest;
            sum[query] = sum[query] * correction + warp_sum(w);
#pragma unroll
            for (int pair = 0; pair < PAIRS_OF_LANE; pair++) {
                mixed[query][pair][0] *= correction;
                mixed[query][pair][1] *= correction;
            }
            if (lane < KEYS_OF_STEP) {
                weights[first_query + query][lane] = w;
            }
        }
        __syncwarp();
#pragma unroll 4
        for (int key = 0; key < KEYS_OF_STEP; key++) {
#pragma unroll
            for (int pair = 0; pair < PAIRS_OF_LANE; pair++) {
                const int at = 2 * (lane + pair * WARP);
                if (at < HEAD_DIM) {
                    const float x = to_float(values[key][at]), y = to_float(values[key][at + 1]);
#pragma unroll
                    for (int query = 0; query < QUERIES_OF_WARP; query++) {
                        const float w = weights[first_query + query][key];
                        mixed[query][pair][0] += w * x;
                        mixed[query][pair][1] += w * y;
                    }
                }
            }
        }
    }
    for (int query = 0; query < QUERIES_OF_WARP && first_query + query < tile.rows; query++) {
        scalar* to = out + (long long)(tile.first_row + first_query + query) * g.heads * HEAD_DIM + head * HEAD_DIM;
        for (int pair = 0; pair < PAIRS_OF_LANE; pair++) {
            const int at = 2 * (lane + pair * WARP);
            if (at < HEAD_DIM) {
                store(to + at, mixed[query][pair][0] / sum[query]);
                store(to + at + 1, mixed[query][pair][1] / sum[query]);
            }
        }
    }
}
