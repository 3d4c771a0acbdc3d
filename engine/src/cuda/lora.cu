// LoRA by depth: one launch for rows of all depths, as Punica's SGMV (arXiv 2310.18547) for rows of many adapters. The
// rows of a pass are sorted by depth; groups of at most GROUP_ROWS rows of one depth share the loads of its adapter.

constexpr int GROUP_ROWS = 8;      // rows of a group
constexpr int RANKS_OF_BLOCK = 4;  // ranks that a block reduces
constexpr int RANKS_OF_STEP = 32;  // ranks of which a block expands at a time,
constexpr int RANKS_AT_ONCE = 16;  // and a thread loads

// Rows from `first_row` on that run at one depth; 0 rows pad a batch.
struct Group {
    int first_row, rows, depth;
};

// One of several adapted projections of one input: the ranks that it reads, and its outputs.
struct Part {
    int first_rank, ranks;
    int first_output, outputs;
    // Start of its matrix `[depths, ranks, outputs]` in the ups.
    long long at;
};

// `out` [rows, ranks] = `x` [rows, inputs] times the downs [depths, ranks, inputs] of each row's depth; rows of depths
// from `depths` on have no adapter. Grid [groups, ranks / RANKS_OF_BLOCK rounded up]: the warps of a block divide the
// inputs.
//
// Rows and ranks beyond the last are read as the last one, so that no load waits for another.
extern "C" __global__ void __launch_bounds__(THREADS) lora_shrink(
    const scalar* x, const scalar* downs, const Group* groups, int depths, int ranks, int inputs, float* out) {
    __shared__ float of_warps[WARPS][RANKS_OF_BLOCK][GROUP_ROWS];
    const Group group = groups[blockIdx.x];
    const int first_rank = blockIdx.y * RANKS_OF_BLOCK;
    if (group.rows == 0 || group.depth >= depths) {
        return;
    }
    constexpr int SIZE = Pack<scalar>::SIZE;
    // Rows are not aligned if their width is not a whole number of packs.
    const bool packed = inputs % SIZE == 0;
    const auto load = [&](const scalar* row, int at) {
        if (packed) {
            return load_pack(row + at);
        }
        Pack<scalar> pack = zero_pack<scalar>();
        for (int i = 0; i < SIZE && at + i < inputs; i++) {
            pack.numbers[i] = row[at + i];
        }
        return pack;
    };
    float sums[RANKS_OF_BLOCK][GROUP_ROWS] = {};
    for (int at = threadIdx.x * SIZE; at < inputs; at += THREADS * SIZE) {
        Pack<scalar> down[RANKS_OF_BLOCK], of_rows[GROUP_ROWS];
#pragma unroll
        for (int r = 0; r < RANKS_OF_BLOCK; r++) {
            const int rank = min(first_rank + r, ranks - 1);
            down[r] = load(downs + ((long long)group.depth * ranks + rank) * inputs, at);
        }
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
            of_rows[row] = load(x + (long long)(group.first_row + min(row, group.rows - 1)) * inputs, at);
        }
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
#pragma unroll
            for (int r = 0; r < RANKS_OF_BLOCK; r++) {
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    sums[r][row] += to_float(down[r].numbers[i]) * to_float(of_rows[row].numbers[i]);
                }
            }
        }
    }
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < RANKS_OF_BLOCK; r++) {
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
            const float sum = warp_sum(sums[r][row]);
            if (lane == 0) {
                of_warps[warp][r][row] = sum;
            }
        }
    }
    __syncthreads();
    static_assert(RANKS_OF_BLOCK * GROUP_ROWS <= THREADS, "a thread for every sum");
    const int row = threadIdx.x / RANKS_OF_BLOCK, r = threadIdx.x % RANKS_OF_BLOCK;
    if (row < group.rows && first_rank + r < ranks) {
        float sum = 0;
        for (int other = 0; other < WARPS; other++) {
            sum += of_warps[other][r][row];
        }
        out[(long long)(group.first_row + row) * ranks + first_rank + r] = sum;
    }
}

// Adds the product of the ups with `shrunk` [rows, ranks] to `y` [rows, outputs], RANKS_OF_STEP ranks at a time.
template <class T> __device__ inline void expand(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    float (&of_rows)[RANKS_OF_STEP][GROUP_ROWS], T* y) {
    const Group group = groups[blockIdx.x];
    const Part part = parts[blockIdx.y];
    if (group.rows == 0 || group.depth >= depths || int(blockIdx.z * THREADS) >= part.outputs) {
        return;
    }
    const int output = blockIdx.z * THREADS + threadIdx.x;
    const scalar* up = ups + part.at + (long long)group.depth * part.ranks * part.outputs + min(output, part.outputs - 1);
    float sums[GROUP_ROWS] = {};
    for (int step = 0; step < part.ranks; step += RANKS_OF_STEP) {
        __syncthreads();
        for (int i = threadIdx.x; i < RANKS_OF_STEP * GROUP_ROWS; i += THREADS) {
            const int row = i / RANKS_OF_STEP, r = i % RANKS_OF_STEP;
            const long long from = (long long)(group.first_row + row) * ranks + part.first_rank + step + r;
            of_rows[r][row] = row < group.rows && step + r < part.ranks ? shrunk[from] : 0.0f;
        }
        __syncthreads();
        for (int first = 0; first < RANKS_OF_STEP; first += RANKS_AT_ONCE) {
            scalar of_ranks[RANKS_AT_ONCE];
#pragma unroll
            for (int r = 0; r < RANKS_AT_ONCE; r++) {
                // Beyond the last rank, that rank is read again and multiplied by zero.
                of_ranks[r] = up[(long long)min(step + first + r, part.ranks - 1) * part.outputs];
            }
            // All loads before the first use: otherwise the compiler makes each wait for the previous one.
            asm volatile("" ::: "memory");
#pragma unroll
            for (int r = 0; r < RANKS_AT_ONCE; r++) {
#pragma unroll
                for (int row = 0; row < GROUP_ROWS; row++) {
                    sums[row] += to_float(of_ranks[r]) * of_rows[first + r][row];
                }
            }
        }
    }
    if (output >= part.outputs) {
        return;
    }
    T* to = y + (long long)group.first_row * outputs + part.first_output + output;
    float before[GROUP_ROWS];
#pragma unroll
    for (int row = 0; row < GROUP_ROWS; row++) {
        before[row] = to_float(to[(long long)min(row, group.rows - 1) * outputs]);
    }
#pragma unroll
    for (int row = 0; row < GROUP_ROWS; row++) {
        if (row < group.rows) {
            store(to + (long long)row * outputs, before[row] + sums[row]);
        }
    }
}

// Grid [groups, parts, outputs of the widest part / THREADS rounded up].
extern "C" __global__ void __launch_bounds__(THREADS) lora_expand(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    scalar* y) {
    __shared__ float of_rows[RANKS_OF_STEP][GROUP_ROWS];
    expand(shrunk, ups, groups, parts, depths, ranks, outputs, of_rows, y);
}

// As `lora_expand`, into f32: the residual stream, or logits.
extern "C" __global__ void __launch_bounds__(THREADS) lora_expand_f32(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    float* y) {
    __shared__ float of_rows[RANKS_OF_STEP][GROUP_ROWS];
    expand(shrunk, ups, groups, parts, depths, ranks, outputs, of_rows, y);
}
