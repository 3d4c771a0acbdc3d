// Storage types, 16-byte loads of them, and sums over warps and blocks.
//
// The files of this folder are joined to one source by `source.rs`, which is compiled in three ways: at run time by
// NVRTC, by the compile check for every architecture, and by a C++ compiler for the CPU after `emulation.h`. They
// therefore include no header. Constants of a model are macros:
//   SCALAR        f32, f16 or bf16: how weights, activations, keys and values are stored; sums are always in f32
//   HEAD_DIM      width of a head
//   GROUP         query heads that share what is loaded of a key-value head
//   BLOCK_TOKENS  positions of a KV block

typedef float f32;
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
typedef SCALAR scalar;

#define NEGATIVE_INFINITY __int_as_float(0xff800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define FULL_WARP 0xffffffffu
constexpr int WARP = 32;
// Threads per block of every kernel.
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ inline unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ inline unsigned short float_to_bfloat(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#define MULTIPLY_TILES(name, type)                                                                                   \
    __device__ inline void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {                      \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "        \
            "{%8, %9}, {%0, %1, %2, %3};"                                                                            \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                         \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                     \
    }
MULTIPLY_TILES(multiply_half_tiles, "f16")
MULTIPLY_TILES(multiply_bfloat_tiles, "bf16")
#endif

// d += a b of a whole warp on its tensor core: `a` is 16 x 16 and `b` 16 x 8, distributed over the lanes as in PTX
// (mma.m16n8k16).
__device__ inline void multiply_tiles(f16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_half_tiles(d, a, b);
}
__device__ inline void multiply_tiles(bf16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_bfloat_tiles(d, a, b);
}

__device__ inline float to_float(f32 x) { return x; }
__device__ inline float to_float(f16 x) { return half_to_float(x.bits); }
__device__ inline float to_float(bf16 x) { return __int_as_float(int(unsigned(x.bits) << 16)); }
__device__ inline void store(f32* to, float x) { *to = x; }
__device__ inline void store(f16* to, float x) { to->bits = float_to_half(x); }
__device__ inline void store(bf16* to, float x) { to->bits = float_to_bfloat(x); }

// The numbers of one load.
template <class T> struct alignas(16) Pack {
    static constexpr int SIZE = 16 / int(sizeof(T));
    T numbers[SIZE];
};

template <class T> __device__ inline Pack<T> load_pack(const T* from) {
    Pack<T> pack;
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(from);
    return pack;
}

template <class T> __device__ inline void store_pack(T* to, const Pack<T>& pack) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&pack);
}

template <class T> __device__ inline Pack<T> zero_pack() {
    Pack<T> pack;
    *reinterpret_cast<uint4*>(&pack) = make_uint4(0, 0, 0, 0);
    return pack;
}

// The sum over the lanes of a warp, in each of them.
__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        x += __shfl_xor_sync(FULL_WARP, x, step);
    }
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    }
    return x;
}

// The sum over the threads of a block, in each of them. `sums` is separate shared memory.
__device__ inline float block_sum(float x, float (&sums)[WARPS]) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) {
        sums[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < WARPS; warp++) {
        sum += sums[warp];
    }
    return sum;
}

// The greatest number of the threads of a block, in each of them. `greatest` is separate shared memory.
__device__ inline float block_max(float x, float (&greatest)[WARPS]) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) {
        greatest[threadIdx.x / WARP] = x;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) {
        x = fmaxf(x, greatest[warp]);
    }
    return x;
}

// A row of the pass, as the kernels need it; a row that pads a batch has position -1.
struct Row {
    int position;
    int depth;
    // Slot of its depth in the cache.
    int slot;
    // The depths at which it writes its key and value.
    int first_fill, end_fill;
    // The entries of a sequence at a depth are stored without gaps. The row's own entry; and the end of those that it
    // attends to, which start at the first or, in layers with a window, at `first_windowed`.
    int entry, end, first_windowed;
    // Start of the sequence's blocks in the block table.
    int first_block;
    // Number of the row's first split among those of all rows.
    int first_split;
};

// Which of `sets` parameter sets a row uses: one for all depths, or one for each.
__device__ inline int set_of(int sets, int depth) { return sets == 1 ? 0 : depth; }
