// LoRA by depth. The product before these kernels multiplies an input with [W; A_0; A_1; ...], the weight and below it the
// downs of all depths: a row of `base` and `shrunk` has the outputs of W and the ranks of every depth. The kernels add
// B_d times the ranks of a row's own depth d. The rows of a pass are sorted by depth; groups of at most GROUP_ROWS rows of
// one depth share the loads of B_d. In 16-bit numbers the sums are on tensor cores: a warp has 16 outputs of 16 rows.

constexpr int GROUP_ROWS = 16;
constexpr int OCTETS = GROUP_ROWS / 8;
constexpr int OUTPUTS_OF_WARP = 16;
constexpr int OUTPUTS_OF_SLICE = WARPS * OUTPUTS_OF_WARP;
// Ranks in shared memory at a time.
constexpr int RANKS_OF_STEP = 128;
// 64 more bytes, so that lanes that read different rows use different banks.
constexpr int RANK_STRIDE = RANKS_OF_STEP + 4 * Pack<scalar>::SIZE;
constexpr int SUM_STRIDE = OUTPUTS_OF_SLICE + 1;
constexpr int NUMBERS_OF_THREAD = GROUP_ROWS * OUTPUTS_OF_SLICE / THREADS;

// Rows from `first_row` on that run at one depth; 0 rows pad a batch.
struct Group {
    int first_row, rows, depth;
};

// Adjacent outputs of a projection.
struct Slice {
    int first_output, outputs;
    // Of the ranks of a depth, those that the projection reads: 0 if it is not adapted.
    int first_rank, ranks;
    // Start of the slice's matrix [outputs, ranks rounded up to whole packs] in the ups, and the distance from one
    // depth's to the next.
    long long at, depth_stride;
};

// Sizes of the adapters of projections of one input.
struct Ranks {
    // Number of depths with an adapter: 0 to `depths` - 1.
    int depths;
    // Ranks of all projections at a depth.
    int ranks;
    // Numbers from a row of the product to the next.
    int stride;
    // Outputs of all projections.
    int outputs;
};

// Outputs [OUTPUTS_OF_WARP, ranks of a step] of the ups, as a warp multiplies them with rows of shrunk inputs: the sums
// of outputs g and g + 8 with rows 2 t and 2 t + 1 of each octet go to lane 4 g + t. Loads come before the first use.
// Beyond the last output and rank, ups are zero.
template <class S> struct Ups {
    static constexpr int RANKS_OF_TILE = 32;
    static constexpr int TILES = RANKS_OF_STEP / RANKS_OF_TILE;
    uint4 upper[TILES], lower[TILES];

    // `up` has `outputs` outputs, `stride` numbers apart, of which `ranks` are left.
    __device__ void load(const S* up, int stride, int outputs, int ranks) {
        const int group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const int at = tile * RANKS_OF_TILE + 8 * quarter;
            const auto load_output = [&](int output) {
                return output < outputs && at < ranks
                           ? *reinterpret_cast<const uint4*>(up + (long long)output * stride + at)
                           : make_uint4(0, 0, 0, 0);
            };
            upper[tile] = load_output(group);
            lower[tile] = load_output(group + 8);
        }
    }

    __device__ void multiply(const S (&of_rows)[GROUP_ROWS][RANK_STRIDE], int rows, int ranks, float (&sums)[OCTETS][4]) {
        const int group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            if (tile * RANKS_OF_TILE >= ranks) {
                return;
            }
            const uint4 a = upper[tile], b = lower[tile];
#pragma unroll
            for (int octet = 0; octet < OCTETS; octet++) {
                if (8 * octet < rows) {
                    const S* row = of_rows[8 * octet + group];
                    const uint4 x = *reinterpret_cast<const uint4*>(&row[tile * RANKS_OF_TILE + 8 * quarter]);
                    multiply_tiles(S(), sums[octet], {a.x, b.x, a.y, b.y}, {x.x, x.y});
                    multiply_tiles(S(), sums[octet], {a.z, b.z, a.w, b.w}, {x.z, x.w});
                }
            }
        }
    }
};

template <> struct Ups<f32> {
    const f32* up;
    int stride, outputs;

    __device__ void load(const f32* from, int numbers, int of_slice, int) {
        up = from;
        stride = numbers;
        outputs = of_slice;
    }

    __device__ void multiply(const f32 (&of_rows)[GROUP_ROWS][RANK_STRIDE], int rows, int ranks, float (&sums)[OCTETS][4]) {
        const int group = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
        for (int rank = 0; rank < ranks; rank += Pack<f32>::SIZE) {
            const auto load_output = [&](int output) {
                return output < outputs ? load_pack(up + (long long)output * stride + rank) : zero_pack<f32>();
            };
            const Pack<f32> of_outputs[2] = {load_output(group), load_output(group + 8)};
#pragma unroll
            for (int octet = 0; octet < OCTETS; octet++) {
                if (8 * octet < rows) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const f32* row = of_rows[8 * octet + 2 * quarter + i % 2];
#pragma unroll
                        for (int r = 0; r < Pack<f32>::SIZE; r++) {
                            sums[octet][i] += of_outputs[i / 2].numbers[r] * row[rank + r];
                        }
                    }
                }
            }
        }
    }
};

// Shared memory of a block.
struct Expansion {
    alignas(16) scalar of_rows[GROUP_ROWS][RANK_STRIDE];
    float sums[GROUP_ROWS][SUM_STRIDE];
};

// The products of a slice's ups with the shrunk inputs of a group's rows: `sums` [rows, outputs of the slice].
template <class T> __device__ inline void expand(
    const T* shrunk, const scalar* ups, const Group& group, const Slice& slice, const Ranks& sizes, Expansion& shared) {
    const int warp = threadIdx.x / WARP, of_warp = threadIdx.x % WARP / 4, quarter = threadIdx.x % 4;
    const int ranks = group.depth < sizes.depths ? slice.ranks : 0, first = warp * OUTPUTS_OF_WARP;
    const int padded = (slice.ranks + Pack<scalar>::SIZE - 1) / Pack<scalar>::SIZE * Pack<scalar>::SIZE;
    const scalar* up = ups + slice.at + group.depth * slice.depth_stride + (long long)first * padded;
    shrunk += (long long)group.first_row * sizes.stride + group.depth * sizes.ranks + slice.first_rank;
    float sums[OCTETS][4] = {};
    for (int step = 0; step < ranks; step += RANKS_OF_STEP) {
        Ups<scalar> of_step;
        of_step.load(up + step, padded, slice.outputs - first, padded - step);
        __syncthreads();
        for (int i = threadIdx.x; i < GROUP_ROWS * RANKS_OF_STEP; i += THREADS) {
            const int row = i / RANKS_OF_STEP, rank = i % RANKS_OF_STEP;
            const bool there = row < group.rows && step + rank < ranks;
            const T* from = shrunk + (long long)row * sizes.stride + step + rank;
            store(&shared.of_rows[row][rank], there ? to_float(*from) : 0.0f);
        }
        __syncthreads();
        of_step.multiply(shared.of_rows, group.rows, min(ranks - step, RANKS_OF_STEP), sums);
    }
#pragma unroll
    for (int octet = 0; octet < OCTETS; octet++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            shared.sums[8 * octet + 2 * quarter + i % 2][first + of_warp + i / 2 * 8] = sums[octet][i];
        }
    }
    __syncthreads();
}

// A thread's share of a slice: number `n` is at a row of the group and an output of the slice, adjacent threads at
// adjacent outputs.
struct Share {
    int row, output;
};

__device__ inline Share share_of(int n) {
    const int i = n * THREADS + threadIdx.x;
    return {i / OUTPUTS_OF_SLICE, i % OUTPUTS_OF_SLICE};
}

// What a group's rows have of a slice's outputs before their adapters: `base`, if it is there, and the biases, if there
// are any. Rows and outputs beyond the last are read as the last one.
template <class T> __device__ inline void load_before(
    const T* base, const float* biases, int sets, const Group& group, const Slice& slice, const Ranks& sizes,
    float (&before)[NUMBERS_OF_THREAD]) {
#pragma unroll
    for (int n = 0; n < NUMBERS_OF_THREAD; n++) {
        const Share share = share_of(n);
        const long long row = group.first_row + min(share.row, group.rows - 1);
        const int output = slice.first_output + min(share.output, slice.outputs - 1);
        before[n] = base ? to_float(base[row * sizes.stride + output]) : 0.0f;
        before[n] += biases ? biases[set_of(sets, group.depth) * sizes.outputs + output] : 0.0f;
    }
}

// `y` [rows, outputs] = base + biases + adapters. `base` [rows, stride] has the outputs, then the ranks of each depth.
// `biases` [sets, outputs] may be null. Grid [groups, slices].
extern "C" __global__ void __launch_bounds__(THREADS) lora_expand(
    const scalar* base, const scalar* ups, const Group* groups, const Slice* slices, Ranks sizes, const float* biases,
    int sets, scalar* y) {
    __shared__ Expansion shared;
    const Group group = groups[blockIdx.x];
    if (group.rows == 0) {
        return;
    }
    const Slice slice = slices[blockIdx.y];
    float before[NUMBERS_OF_THREAD];
    load_before(base, biases, sets, group, slice, sizes, before);
    expand(base + sizes.outputs, ups, group, slice, sizes, shared);
#pragma unroll
    for (int n = 0; n < NUMBERS_OF_THREAD; n++) {
        const Share share = share_of(n);
        if (share.row < group.rows && share.output < slice.outputs) {
            const long long row = group.first_row + share.row;
            store(y + row * sizes.outputs + slice.first_output + share.output,
                  before[n] + shared.sums[share.row][share.output]);
        }
    }
}

// `y` [rows, outputs] += base + biases + adapters: the residual stream, or, without a base, logits. `shrunk` [rows,
// stride] has the ranks of each depth, `base` and `biases` are as for `lora_expand`, or null. Grid [groups, slices].
extern "C" __global__ void __launch_bounds__(THREADS) lora_add(
    const float* base, const float* shrunk, const scalar* ups, const Group* groups, const Slice* slices, Ranks sizes,
    const float* biases, int sets, float* y) {
    __shared__ Expansion shared;
    const Group group = groups[blockIdx.x];
    if (group.rows == 0) {
        return;
    }
    const Slice slice = slices[blockIdx.y];
    float before[NUMBERS_OF_THREAD];
    load_before(base, biases, sets, group, slice, sizes, before);
    expand(shrunk, ups, group, slice, sizes, shared);
#pragma unroll
    for (int n = 0; n < NUMBERS_OF_THREAD; n++) {
        const Share share = share_of(n);
        if (share.row < group.rows && share.output < slice.outputs) {
            const long long row = group.first_row + share.row;
            y[row * sizes.outputs + slice.first_output + share.output] +=
                before[n] + shared.sums[share.row][share.output];
        }
    }
}

// `out` [rows, inner] = activation(gate) * up, where gate and up are the two halves of base + biases + adapters; as
// `lora_expand` and `activate` one after the other, but without rounding in between. Grid [groups, slices of one half].
extern "C" __global__ void __launch_bounds__(THREADS) lora_activate(
    const scalar* base, const scalar* ups, const Group* groups, const Slice* slices, Ranks sizes, const float* biases,
    int sets, int activation, scalar* out) {
    __shared__ Expansion shared;
    const Group group = groups[blockIdx.x];
    if (group.rows == 0) {
        return;
    }
    const Slice of_gate = slices[blockIdx.y], of_up = slices[gridDim.y + blockIdx.y];
    float gates[NUMBERS_OF_THREAD], of_ups[NUMBERS_OF_THREAD];
    load_before(base, biases, sets, group, of_gate, sizes, gates);
    load_before(base, biases, sets, group, of_up, sizes, of_ups);
    expand(base + sizes.outputs, ups, group, of_gate, sizes, shared);
#pragma unroll
    for (int n = 0; n < NUMBERS_OF_THREAD; n++) {
        gates[n] = activated(gates[n] + shared.sums[share_of(n).row][share_of(n).output], activation);
    }
    __syncthreads();
    expand(base + sizes.outputs, ups, group, of_up, sizes, shared);
#pragma unroll
    for (int n = 0; n < NUMBERS_OF_THREAD; n++) {
        const Share share = share_of(n);
        if (share.row < group.rows && share.output < of_gate.outputs) {
            const long long row = group.first_row + share.row;
            store(out + row * (sizes.outputs / 2) + of_gate.first_output + share.output,
                  gates[n] * (of_ups[n] + shared.sums[share.row][share.output]));
        }
    }
}
