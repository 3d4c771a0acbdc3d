// Attention over rows of mixed sequences, lengths and depths, on paged keys and values.
//
//   cache  [layer][block] pages     layers: those of the prelude, then at each depth those of the block and the coda
//   page   keys [kv head][entry][HEAD_DIM], then values likewise
//
// Queries are rotated once, in place, when keys are stored. Decode rows attend in items: splits of their history at fixed
// entries, so that the result for a row does not depend on other rows. The longest items come first, so that short ones
// fill what the last long ones leave of the GPU; the order changes no bit. A second kernel joins the splits of rows that
// have several. The rows of a prompt chunk attend in tiles of QUERIES. Both kernels are in attend_f32.cu for 32-bit
// numbers, and on tensor cores in attend_16.cu for 16-bit numbers.

constexpr int SPLIT = 256;    // entries of a split
constexpr int QUERIES = 16;   // rows of a tile
constexpr float LOG2_E = 1.44269504f;

struct Geometry {
    int heads, kv_heads;
    // KV blocks of the cache.
    int blocks;
    // The layer at depth d is first_layer + (d modulo depths) * layer_stride.
    int first_layer, layer_stride, depths;
    // Whether the layer belongs to the prelude, where every row writes one entry, independent of depths.
    int once;
    // Number of sights: one for all depths, or one for each.
    int sights;
    // Rotary tables: number of positions, and number of leading dimensions that are rotated.
    int positions, rotary_dims;
    // Factor of attention scores.
    float scale;
};

struct Sight {
    // Whether only the latest positions count.
    int windowed;
    // Index of the rotary table for queries and keys.
    int rotary;
};

// One split of a decode row's history; row -1 pads a batch.
struct Item {
    int row, split;
};

// Rows of one sequence and depth at consecutive positions.
struct Tile {
    int first_row, rows;
};

// An entry of the cache that deeper depths share: KV fill by reuse.
struct Fill {
    int block, offset, depth;
};

__device__ inline long long page_numbers(const Geometry& g) { return 2LL * g.kv_heads * BLOCK_TOKENS * HEAD_DIM; }

// A page of a slot: that of depth d is d modulo the number of slots. Rows have theirs with them.
__device__ inline long long page_at(const Geometry& g, int slot, int block) {
    const int layer = g.first_layer + slot * g.layer_stride;
    return ((long long)layer * g.blocks + block) * page_numbers(g);
}

// Index of a key within a page; its value is `values_at` further on.
__device__ inline long long key_at(int kv_head, int offset) {
    return ((long long)kv_head * BLOCK_TOKENS + offset) * HEAD_DIM;
}

__device__ inline long long values_at(const Geometry& g) { return page_numbers(g) / 2; }

// Number `i` of a head, rotated by a position's cosines and sines.
__device__ inline float rotated(const scalar* head, const float* turn, int rotary_dims, int i) {
    const int half = rotary_dims / 2;
    const float x = to_float(head[i]);
    if (i < half) {
        return x * turn[i] - to_float(head[half + i]) * turn[half + i];
    }
    if (i < rotary_dims) {
        return x * turn[i - half] + to_float(head[i - half]) * turn[i];
    }
    return x;
}

__device__ inline const float* turn_of(const float* rotary, const Geometry& g, const Sight& sight, int position) {
    return rotary + ((long long)sight.rotary * g.positions + position) * g.rotary_dims;
}

__device__ inline int first_seen(const Sight& sight, const Row& row) { return sight.windowed ? row.first_windowed : 0; }

// Rotates the rows' queries in `qkv` in place, and stores their rotated keys and their values in the cache. Grid [rows,
// heads + kv heads].
extern "C" __global__ void __launch_bounds__(THREADS) rotate_and_store(
    scalar* qkv, const float* rotary, const Row* rows, const int* block_table, const Sight* sights, Geometry g,
    scalar* pages) {
    const Row row = rows[blockIdx.x];
    if (row.position < 0) {
        return;
    }
    const Sight sight = sights[set_of(g.sights, row.depth)];
    const float* turn = turn_of(rotary, g, sight, row.position);
    scalar* head = qkv + ((long long)blockIdx.x * (g.heads + 2 * g.kv_heads) + blockIdx.y) * HEAD_DIM;
    const int kv_head = int(blockIdx.y) - g.heads;
    if (kv_head < 0) {
        // The two numbers of a pair are rotated by one thread, which reads both before it writes.
        const int half = g.rotary_dims / 2;
        for (int i = threadIdx.x; i < half; i += THREADS) {
            const float x = rotated(head, turn, g.rotary_dims, i), y = rotated(head, turn, g.rotary_dims, half + i);
            store(head + i, x);
            store(head + half + i, y);
        }
        return;
    }
    const scalar* value = head + g.kv_heads * HEAD_DIM;
    const int block = block_table[row.first_block + row.entry / BLOCK_TOKENS];
    const long long at = key_at(kv_head, row.entry % BLOCK_TOKENS);
    const int first = g.once ? 0 : row.first_fill, end = g.once ? 1 : row.end_fill;
    for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
        const float turned = rotated(head, turn, g.rotary_dims, i);
        for (int depth = first; depth < end; depth++) {
            scalar* page = pages + page_at(g, depth % g.depths, block);
            store(page + at + i, turned);
            page[values_at(g) + at + i] = value[i];
        }
    }
}

// Copies keys and values of exited tokens to the depths they skipped. Grid [fills, layers at each depth]; `g` is the
// geometry of the first of those layers.
extern "C" __global__ void __launch_bounds__(THREADS) fill_deeper(
    const Fill* fills, Geometry g, scalar* pages) {
    const Fill fill = fills[blockIdx.x];
    g.first_layer += blockIdx.y;
    constexpr int PACKS = HEAD_DIM / Pack<scalar>::SIZE;
    for (int i = threadIdx.x; i < 2 * g.kv_heads * PACKS; i += THREADS) {
        const int kv_head = i / PACKS % g.kv_heads;
        const long long half = i / PACKS < g.kv_heads ? 0 : values_at(g);
        const long long at = half + key_at(kv_head, fill.offset) + i % PACKS * Pack<scalar>::SIZE;
        const Pack<scalar> pack = load_pack(pages + page_at(g, fill.depth % g.depths, fill.block) + at);
        for (int depth = fill.depth + 1; depth < g.depths; depth++) {
            store_pack(pages + page_at(g, depth, fill.block) + at, pack);
        }
    }
}

// exp2(x - top); 0 in the initial state.
__device__ inline float weight(float x, float top) { return x == NEGATIVE_INFINITY ? 0.0f : exp2f(x - top); }

// Writes number `at` of a head for one split of its row's history: the output of attention if the row has no other
// split, otherwise the split's greatest score, its sum of weights, and the weighted values.
__device__ inline void leave_split(bool whole, const Item& item, const Row& row, const Geometry& g, int head, int at,
                                   float top, float sum, float mix, float* partial, scalar* out) {
    if (whole) {
        store(out + (long long)item.row * g.heads * HEAD_DIM + head * HEAD_DIM + at, mix / sum);
        return;
    }
    float* split = partial + ((long long)(row.first_split + item.split) * g.heads + head) * (2 + HEAD_DIM);
    if (at == 0) {
        split[0] = top;
        split[1] = sum;
    }
    split[2 + at] = mix;
}

// Joins the splits of the decode rows in `joins`; row -1 pads a batch. Grid [joins, heads].
extern "C" __global__ void __launch_bounds__(THREADS) attend_join(
    const float* __restrict__ partial, const int* joins, const Row* rows, const Sight* sights, Geometry g, scalar* out) {
    const int index = joins[blockIdx.x];
    if (index < 0) {
        return;
    }
    const Row row = rows[index];
    const Sight sight = sights[set_of(g.sights, row.depth)];
    const int first = first_seen(sight, row) / SPLIT, last = (row.end - 1) / SPLIT;
    if (first == last) {
        return;
    }
    const int head = blockIdx.y;
    const long long stride = (long long)g.heads * (2 + HEAD_DIM);
    const float* splits = partial + row.first_split * stride + head * (2 + HEAD_DIM);
    float top = NEGATIVE_INFINITY;
#pragma unroll 4
    for (int split = first; split <= last; split++) {
        top = fmaxf(top, splits[split * stride]);
    }
    for (int at = threadIdx.x; at < HEAD_DIM; at += THREADS) {
        float sum = 0, mix = 0;
#pragma unroll 4
        for (int split = first; split <= last; split++) {
            const float share = weight(splits[split * stride], top);
            sum += share * splits[split * stride + 1];
            mix += share * splits[split * stride + 2 + at];
        }
        store(out + (long long)index * g.heads * HEAD_DIM + head * HEAD_DIM + at, mix / sum);
    }
}
