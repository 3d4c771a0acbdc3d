// CUDA's built-ins for a C++ compiler: the kernels as they are, run on the CPU, a block at a time.
//
// A thread of a block is a fibre. Fibres run one after the other, each up to its next barrier or shuffle, in an order
// that changes from barrier to barrier: so what only a barrier keeps in order comes out of order without it. Before a
// block starts, its shared memory is filled with NaN; so is memory that is handed out, which ends at a page that may
// not be touched. Accesses beyond it, misaligned ones, and indices beyond an array end the launch with an error.

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __restrict__
#define __align__(bytes) __attribute__((aligned(bytes)))
// In a section of its own, so that it can be filled as a whole.
#define __shared__ static __attribute__((section("emulated_shared")))

extern "C" char __start_emulated_shared[], __stop_emulated_shared[];

struct Index {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static Index threadIdx, blockIdx, gridDim;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __int_as_float(unsigned bits) { return bits_as<float>(bits); }

inline float half_to_float(unsigned short bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return __int_as_float(sign | 0x7f800000 | fraction << 13);
    }
    const float magnitude =
        exponent ? ldexpf(float(1024 + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return sign ? -magnitude : magnitude;
}

// To the nearest, of two equally near the even one.
inline unsigned short float_to_half(float x) {
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = fabsf(x);
    if (std::isnan(x)) {
        return 0x7fff;
    }
    if (magnitude >= 65520.0f) {
        return sign | 0x7c00;
    }
    if (magnitude == 0) {
        return sign;
    }
    int exponent;
    frexpf(magnitude, &exponent);
    const int step = (exponent < -13 ? -13 : exponent) - 11;
    const float steps = nearbyintf(ldexpf(magnitude, -step));
    // Steps of a normal number are 1024 to 2048; the exponent's field and the carry into it add up.
    return sign | (unsigned short)((step + 24) * 1024 + int(steps));
}

inline unsigned short float_to_bfloat(float x) {
    const uint32_t bits = bits_as<uint32_t>(x);
    if (std::isnan(x)) {
        return 0x7fff;
    }
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

namespace emulation {

constexpr int MAX_THREADS = 128, WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 1 << 17;

enum State { READY, AT_WARP, AT_BLOCK, ENDED };

struct Fibre {
    jmp_buf at;
    State state;
    // Shuffles so far: which of two slots the next one uses.
    unsigned shuffles;
};

static Fibre fibres[MAX_THREADS];
static bool alive;
static jmp_buf scheduler;
static sigjmp_buf outside;
static volatile sig_atomic_t running;
static unsigned current;
static uint64_t slots[2][MAX_THREADS];
static void (*body)(void**);
static void** arguments;
static char message[512];

// Leaves the fibre until the scheduler comes back to it.
static void wait(State state) {
    const unsigned me = current;
    fibres[me].state = state;
    if (_setjmp(fibres[me].at) == 0) {
        _longjmp(scheduler, 1);
    }
}

static void run_threads() {
    for (;;) {
        body(arguments);
        wait(ENDED);
    }
}

static void start_fibres() {
    static char* stacks = nullptr;
    if (!stacks) {
        stacks = static_cast<char*>(mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
    for (unsigned thread = 0; thread < MAX_THREADS; thread++) {
        // A fibre is born by a context, and from then on left and entered by jumps, which make no system call.
        static ucontext_t birth, here;
        getcontext(&birth);
        birth.uc_stack.ss_sp = stacks + thread * STACK_BYTES;
        birth.uc_stack.ss_size = STACK_BYTES;
        birth.uc_link = nullptr;
        makecontext(&birth, [] {
            const unsigned me = current;
            if (_setjmp(fibres[me].at) == 0) {
                _longjmp(scheduler, 1);
            }
            run_threads();
        }, 0);
        current = thread;
        if (_setjmp(scheduler) == 0) {
            swapcontext(&here, &birth);
        }
    }
    alive = true;
}

static void enter(unsigned thread) {
    current = thread;
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler) == 0) {
        _longjmp(fibres[thread].at, 1);
    }
}

static bool all(unsigned first, unsigned end, State state) {
    for (unsigned thread = first; thread < end; thread++) {
        if (fibres[thread].state != state) {
            return false;
        }
    }
    return true;
}

static void release(unsigned first, unsigned end) {
    for (unsigned thread = first; thread < end; thread++) {
        fibres[thread].state = READY;
    }
}

// Runs the threads of one block to their end; false if they wait for each other for ever.
static bool run_block(unsigned threads, uint64_t& random) {
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
    for (unsigned thread = 0; thread < threads; thread++) {
        fibres[thread].state = READY;
        fibres[thread].shuffles = 0;
    }
    while (!all(0, threads, ENDED)) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        const unsigned start = random >> 33, stride = (random >> 40) | 1;
        for (unsigned i = 0; i < threads; i++) {
            const unsigned thread = (start + i * stride) % threads;
            if (fibres[thread].state == READY) {
                enter(thread);
            }
        }
        bool released = all(0, threads, ENDED);
        for (unsigned warp = 0; warp < threads; warp += WARP_SIZE) {
            if (all(warp, warp + WARP_SIZE, AT_WARP)) {
                release(warp, warp + WARP_SIZE);
                released = true;
            }
        }
        if (all(0, threads, AT_BLOCK)) {
            release(0, threads);
            released = true;
        }
        if (!released) {
            return false;
        }
    }
    return true;
}

static struct sigaction before[NSIG];

static void fault(int signal, siginfo_t* info, void*) {
    if (!running) {
        // Not a kernel's doing: as if this handler had never been there.
        sigaction(signal, &before[signal], nullptr);
        return;
    }
    const char* what = signal == SIGILL || signal == SIGTRAP ? "an index beyond an array, or a misaligned access"
                       : signal == SIGFPE                    ? "a division by zero"
                                                             : "an access out of bounds";
    snprintf(message, sizeof message, "%s (address %p) in block (%u, %u, %u), thread %u", what, info->si_addr,
             blockIdx.x, blockIdx.y, blockIdx.z, current);
    siglongjmp(outside, 1);
}

constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

struct Kernel {
    const char* name;
    int arguments;
    // Of each argument.
    const size_t* sizes;
    void (*call)(void**);
};

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <auto function> struct Entry;
template <class... A, void (*function)(A...)> struct Entry<function> {
    static constexpr size_t SIZES[] = {sizeof(A)...};
    static void run(void** arguments) { call(function, arguments, std::index_sequence_for<A...>()); }
    static constexpr Kernel kernel(const char* name) { return {name, sizeof...(A), SIZES, run}; }
};

}  // namespace emulation

template <class T> inline T __shfl_xor_sync(unsigned, T x, int step) {
    static_assert(sizeof(T) <= 8, "");
    using namespace emulation;
    const unsigned me = current, slot = fibres[me].shuffles++ % 2;
    memcpy(&slots[slot][me], &x, sizeof x);
    wait(AT_WARP);
    T other;
    memcpy(&other, &slots[slot][me ^ unsigned(step)], sizeof other);
    return other;
}
template <class T> inline T __shfl_sync(unsigned mask, T x, int lane) {
    return __shfl_xor_sync(mask, x, lane ^ int(emulation::current % emulation::WARP_SIZE));
}
// A product of tiles by a warp: lane 4 g + t holds rows g and g + 8 of `a`, column g of `b`, and of the sums rows g and
// g + 8 at columns 2 t and 2 t + 1.
inline void multiply_tiles_by(float (*to_float)(unsigned short), float (&d)[4], const unsigned (&a)[4],
                              const unsigned (&b)[2]) {
    using namespace emulation;
    static float rows[2][MAX_THREADS / WARP_SIZE][16][16], columns[2][MAX_THREADS / WARP_SIZE][8][16];
    const unsigned me = current, slot = fibres[me].shuffles++ % 2, warp = me / WARP_SIZE;
    const unsigned group = me % WARP_SIZE / 4, of_group = me % 4;
    for (unsigned word = 0; word < 4; word++) {
        for (unsigned half = 0; half < 2; half++) {
            const unsigned at = 2 * of_group + half;
            rows[slot][warp][group + word % 2 * 8][at + word / 2 * 8] = to_float((unsigned short)(a[word] >> (16 * half)));
            if (word < 2) {
                columns[slot][warp][group][at + word * 8] = to_float((unsigned short)(b[word] >> (16 * half)));
            }
        }
    }
    wait(AT_WARP);
    for (unsigned k = 0; k < 16; k++) {
        for (unsigned of_sums = 0; of_sums < 4; of_sums++) {
            const unsigned row = group + of_sums / 2 * 8, column = of_group * 2 + of_sums % 2;
            d[of_sums] += rows[slot][warp][row][k] * columns[slot][warp][column][k];
        }
    }
}
inline float bfloat_to_float(unsigned short bits) { return __int_as_float(unsigned(bits) << 16); }
inline void multiply_half_tiles(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_tiles_by(half_to_float, d, a, b);
}
inline void multiply_bfloat_tiles(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    multiply_tiles_by(bfloat_to_float, d, a, b);
}
inline void __syncwarp() { emulation::wait(emulation::AT_WARP); }
inline void __syncthreads() { emulation::wait(emulation::AT_BLOCK); }

extern "C" void* emulated_allocate(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
    char* all = static_cast<char*>(
        mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (all == MAP_FAILED) {
        return nullptr;
    }
    mprotect(all, page, PROT_NONE);
    mprotect(all + page + inner, page, PROT_NONE);
    memset(all + page, 0xff, inner);
    return all + page + inner - (bytes + 15) / 16 * 16;
}

extern "C" void emulated_free(void* memory, size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (bytes + page - 1) / page * page;
    char* end = static_cast<char*>(memory) + (bytes + 15) / 16 * 16;
    munmap(end - inner - page, inner + 2 * page);
}

extern "C" const emulation::Kernel emulated_kernels[];

namespace emulation {

static const Kernel* find(const char* name) {
    const Kernel* kernel = emulated_kernels;
    while (kernel->name && strcmp(kernel->name, name) != 0) {
        kernel++;
    }
    return kernel->name ? kernel : nullptr;
}

// Does work whose faults are caught; null, or what went wrong.
template <class Work> const char* guarded(Work work) {
    struct sigaction action = {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (int signal : FAULTS) {
        sigaction(signal, &action, &before[signal]);
    }
    message[0] = 0;
    if (sigsetjmp(outside, 1) == 0) {
        running = 1;
        work();
    }
    running = 0;
    for (int signal : FAULTS) {
        sigaction(signal, &before[signal], nullptr);
    }
    return message[0] ? message : nullptr;
}

}  // namespace emulation

// Sizes of a kernel's arguments; null if there is no such kernel.
extern "C" const size_t* emulated_sizes(const char* name) {
    const emulation::Kernel* kernel = emulation::find(name);
    return kernel ? kernel->sizes : nullptr;
}

// Runs every block of a launch; null, or what went wrong.
extern "C" const char* emulated_launch(const char* name, const unsigned* grid, unsigned threads, void** arguments,
                                       int count, uint64_t seed) {
    using namespace emulation;
    const Kernel* kernel = find(name);
    if (!kernel || kernel->arguments != count) {
        snprintf(message, sizeof message, "there is no kernel %s of %d arguments", name, count);
        return message;
    }
    body = kernel->call;
    emulation::arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    const char* error = guarded([&] {
        if (!alive) {
            start_fibres();
        }
        uint64_t random = seed;
        for (unsigned block = 0; block < grid[0] * grid[1] * grid[2] && !message[0]; block++) {
            blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
            if (!run_block(threads, random)) {
                snprintf(message, sizeof message,
                         "a barrier or shuffle that not all threads reach, in block (%u, %u, %u)", blockIdx.x,
                         blockIdx.y, blockIdx.z);
            }
        }
    });
    // Fibres that a fault or a barrier left in the middle of a kernel cannot be used again.
    alive = alive && !error;
    return error;
}

namespace emulation {

enum Storage { F32 = 0, F16 = 1, BF16 = 2 };
enum Out { STORED = 0, REPLACED_F32 = 1, ADDED_TO_F32 = 2 };

static float load_number(uint64_t address, int storage, size_t index) {
    if (storage == F32) {
        return reinterpret_cast<const float*>(address)[index];
    }
    const unsigned short bits = reinterpret_cast<const unsigned short*>(address)[index];
    return storage == F16 ? half_to_float(bits) : __int_as_float(unsigned(bits) << 16);
}

static void store_number(uint64_t address, int storage, size_t index, float x) {
    if (storage == F32) {
        reinterpret_cast<float*>(address)[index] = x;
    } else {
        reinterpret_cast<unsigned short*>(address)[index] = storage == F16 ? float_to_half(x) : float_to_bfloat(x);
    }
}

}  // namespace emulation

// What a product is of: `x` [rows, inputs], a weight [outputs, inputs], `y` [rows, outputs].
struct Operands {
    int storage, out;
    size_t rows, inputs, outputs;
    uint64_t x, weight, y;
};

// A product as a library would compute it; null, or what went wrong.
extern "C" const char* emulated_product(const Operands* of) {
    using namespace emulation;
    return guarded([&] {
        for (size_t row = 0; row < of->rows; row++) {
            for (size_t output = 0; output < of->outputs; output++) {
                float sum = 0;
                for (size_t i = 0; i < of->inputs; i++) {
                    sum += load_number(of->x, of->storage, row * of->inputs + i) *
                           load_number(of->weight, of->storage, output * of->inputs + i);
                }
                const size_t at = row * of->outputs + output;
                if (of->out == ADDED_TO_F32) {
                    sum += load_number(of->y, F32, at);
                }
                store_number(of->y, of->out == STORED ? of->storage : F32, at, sum);
            }
        }
    });
}
