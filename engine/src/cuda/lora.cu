// LoRA by depth: one launch for rows of all depths, as Punica's SGMV (arXiv 2310.18547) does for rows of many adapters.
// The rows of a pass come by depth; groups of at most GROUP_ROWS rows of one depth share what is loaded of its adapter.

constexpr int GROUP_ROWS = 8;      // rows of a group
constexpr int RANKS_OF_WARP = 4;   // ranks that a warp reduces at a time

// Rows `first_row ..` of a pass that run at one depth; none (0 rows) pads a batch.
struct Group {
    int first_row, rows, depth;
};

// One of several adapted projections of the same input: the ranks it reads and the outputs it gives.
struct Part {
    int first_rank, ranks;
    int first_output, outputs;
    // Where its matrix `[depths, ranks, outputs]` starts in the ups.
    long long at;
};

// `out` [rows, ranks] = `x` [rows, inputs] times the downs [depths, ranks, inputs] of each row's depth; rows of depths
// from `depths` on have no adapter. Grid [groups, ranks / (WARPS * RANKS_OF_WARP) rounded up].
extern "C" __global__ void __launch_bounds__(THREADS) lora_shrink(
    const scalar* x, const scalar* downs, const Group* groups, int depths, int ranks, int inputs, float* out) {
    const Group group = groups[blockIdx.x];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_rank = (blockIdx.y * WARPS + warp) * RANKS_OF_WARP;
    if (group.rows == 0 || group.depth >= depths || first_rank >= ranks) {
        return;
    }
    constexpr int SIZE = Pack<scalar>::SIZE;
    // Rows whose width is no whole number of packs are not aligned.
    const bool packed = inputs % SIZE == 0;
    float sums[RANKS_OF_WARP][GROUP_ROWS] = {};
    for (int at = lane * SIZE; at < inputs; at += WARP * SIZE) {
        Pack<scalar> down[RANKS_OF_WARP];
#pragma unroll
        for (int r = 0; r < RANKS_OF_WARP; r++) {
            const scalar* from = downs + ((long long)group.depth * ranks + first_rank + r) * inputs + at;
            down[r] = zero_pack<scalar>();
            if (first_rank + r < ranks && packed) {
                down[r] = load_pack(from);
            } else if (first_rank + r < ranks) {
                for (int i = 0; i < SIZE && at + i < inputs; i++) {
                    down[r].numbers[i] = from[i];
                }
            }
        }
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
            if (row < group.rows) {
                const scalar* from = x + (long long)(group.first_row + row) * inputs + at;
                Pack<scalar> pack = zero_pack<scalar>();
                if (packed) {
                    pack = load_pack(from);
                } else {
                    for (int i = 0; i < SIZE && at + i < inputs; i++) {
                        pack.numbers[i] = from[i];
                    }
                }
#pragma unroll
                for (int r = 0; r < RANKS_OF_WARP; r++) {
#pragma unroll
                    for (int i = 0; i < SIZE; i++) {
                        sums[r][row] += to_float(down[r].numbers[i]) * to_float(pack.numbers[i]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < RANKS_OF_WARP; r++) {
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
            const float sum = warp_sum(sums[r][row]);
            if (lane == 0 && row < group.rows && first_rank + r < ranks) {
                out[(long long)(group.first_row + row) * ranks + first_rank + r] = sum;
            }
        }
    }
}

// Adds to `y` [rows, outputs] what the ups make of `shrunk` [rows, ranks].
template <class T> __device__ inline void expand(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    T* y) {
    const Group group = groups[blockIdx.x];
    const Part part = parts[blockIdx.y];
    const int output = blockIdx.z * THREADS + threadIdx.x;
    if (group.rows == 0 || group.depth >= depths || output >= part.outputs) {
        return;
    }
    const scalar* up = ups + part.at + (long long)group.depth * part.ranks * part.outputs + output;
    const float* from = shrunk + (long long)group.first_row * ranks + part.first_rank;
    float sums[GROUP_ROWS] = {};
#pragma unroll 4
    for (int r = 0; r < part.ranks; r++) {
        const float u = to_float(up[(long long)r * part.outputs]);
#pragma unroll
        for (int row = 0; row < GROUP_ROWS; row++) {
            if (row < group.rows) {
                sums[row] += u * from[(long long)row * ranks + r];
            }
        }
    }
#pragma unroll
    for (int row = 0; row < GROUP_ROWS; row++) {
        if (row < group.rows) {
            T* to = y + (long long)(group.first_row + row) * outputs + part.first_output + output;
            store(to, to_float(*to) + sums[row]);
        }
    }
}

// Grid [groups, parts, outputs of the widest part / THREADS rounded up].
extern "C" __global__ void __launch_bounds__(THREADS) lora_expand(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    scalar* y) {
    expand(shrunk, ups, groups, parts, depths, ranks, outputs, y);
}

// The same into f32: the residual stream, or logits.
extern "C" __global__ void __launch_bounds__(THREADS) lora_expand_f32(
    const float* shrunk, const scalar* ups, const Group* groups, const Part* parts, int depths, int ranks, int outputs,
    float* y) {
    expand(shrunk, ups, groups, parts, depths, ranks, outputs, y);
}
