// CUDA's execution model on a CPU, for tests: each thread of a block is a fiber, blocks run one after the other.
//
// What it can show: a missing barrier (shared memory is poisoned before each block, and threads run in either order),
// threads that do not meet at one (a deadlock is an error), a misaligned vector access, an access outside a tensor
// (tests put guard pages around each; the fault is caught), how often each byte of an output is written.
// What it cannot: the memory model, speed, the tensor cores' rounding (products are summed in double here).
#ifndef FASTLORA_CUDA_EMULATE_H
#define FASTLORA_CUDA_EMULATE_H

#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define FL_DEVICE static inline
#define FL_BOTH static inline
#define FL_KERNEL(threads, blocks) void
#define FL_UNROLL
#define FL_ARGS const
#define FL_NOINLINE static
#define FL_SHARED(type, name) type& name = *(type*)emulator::shared_memory(sizeof(type))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
FL_BOTH uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
FL_BOTH uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

static dim3 gridDim, blockIdx, blockDim, threadIdx;

namespace emulator {

enum Status : int64_t { OK = 0, DEADLOCK = 1001, OUTSIDE = 1002, MISALIGNED = 1003, SHARED_TOO_LARGE = 1004 };
enum { LANES = 32, SLOT = 64, SHARED_BYTES = 48 << 10, STACK_BYTES = 64 << 10 };

struct Meeting {  // where `expected` threads wait for one another
    int expected = 0, arrived = 0;
    uint64_t generation = 0;
};
struct Warp {
    Meeting meeting;
    alignas(16) unsigned char slots[2][LANES][SLOT];
};
struct Fiber {
    ucontext_t context;  // to start it; then jumps, which leave the signal mask alone, are twice as fast
    jmp_buf place;
    std::unique_ptr<char[]> stack;
    bool started, done;
    int64_t asked;  // shared memory declared so far
};
struct Watched {
    char* base;
    int64_t bytes;
    uint8_t* counts;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Watched> watched;
static Meeting block_meeting;
static jmp_buf scheduler;
static int current;
static bool progress, descending;
static const std::function<void()>* body;
static sigjmp_buf escape;
alignas(128) static unsigned char shared_bytes[SHARED_BYTES];

[[noreturn]] static void fail(Status status) { siglongjmp(escape, (int)status); }
static void on_fault(int) { fail(OUTSIDE); }

static void yield() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

static void meet(Meeting& meeting) {
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.generation;
        progress = true;
        return;
    }
    while (meeting.generation == generation) yield();
}

// Every kernel declares the same shared variables in the same order in each of its threads.
static void* shared_memory(size_t bytes) {
    Fiber& fiber = fibers[current];
    const int64_t at = (fiber.asked + 127) / 128 * 128;
    fiber.asked = at + (int64_t)bytes;
    if (fiber.asked > SHARED_BYTES) fail(SHARED_TOO_LARGE);
    return shared_bytes + at;
}

static void aligned(const void* p, size_t bytes) {
    if ((uintptr_t)p % bytes) fail(MISALIGNED);
}

// What each lane of the warp gave; valid until its next exchange but one.
template <class T>
static const unsigned char (*exchange(const T& value))[SLOT] {
    static_assert(sizeof(T) <= SLOT, "too large for a slot");
    Warp& warp = warps[current / LANES];
    const int side = (int)(warp.meeting.generation & 1);
    memcpy(warp.slots[side][current % LANES], &value, sizeof(T));
    meet(warp.meeting);
    return warp.slots[side];
}

template <class T>
static T from_lane(const T& value, int lane) {
    T got;
    memcpy(&got, exchange(value)[lane % LANES], sizeof(T));
    return got;
}

static void run_fiber() {
    (*body)();
    fibers[current].done = true;
    progress = true;
    _longjmp(scheduler, 1);
}

// Until the thread waits or ends.
static void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    setcontext(&fiber.context);
}

static void run_block(int threads) {
    memset(shared_bytes, 0xff, sizeof(shared_bytes));  // NaN
    block_meeting = Meeting{threads, 0, 0};
    for (int w = 0; w < (int)warps.size(); ++w) {
        const int left = threads - w * LANES;
        warps[w].meeting = Meeting{left < LANES ? left : LANES, 0, 0};
    }
    for (Fiber& fiber : fibers) fiber.started = fiber.done = false, fiber.asked = 0;
    for (int left = threads; left;) {
        progress = false;
        left = 0;
        for (int i = 0; i < threads; ++i) {
            current = descending ? threads - 1 - i : i;
            Fiber& fiber = fibers[current];
            if (fiber.done) continue;
            ++left;
            threadIdx = dim3((unsigned)current, 0, 0);
            resume(fiber);
        }
        if (left && !progress) fail(DEADLOCK);
    }
}

static int64_t run_grid(dim3 grid, int threads, const std::function<void()>& kernel) {
    body = &kernel;
    gridDim = grid;
    blockDim = dim3((unsigned)threads);
    if ((int)fibers.size() != threads) {
        fibers = std::vector<Fiber>((size_t)threads);
        for (Fiber& fiber : fibers) fiber.stack.reset(new char[STACK_BYTES]);
        warps = std::vector<Warp>((size_t)(threads + LANES - 1) / LANES);
    }
    static char handler_stack[64 << 10];
    stack_t own = {}, other_stack;
    own.ss_sp = handler_stack;
    own.ss_size = sizeof(handler_stack);
    sigaltstack(&own, &other_stack);
    struct sigaction action = {}, segv, bus;
    action.sa_handler = on_fault;
    action.sa_flags = SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    const int64_t status = sigsetjmp(escape, 1);
    if (!status)
        for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
    sigaction(SIGSEGV, &segv, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    sigaltstack(&other_stack, nullptr);
    return status;
}

}  // namespace emulator

FL_DEVICE void barrier() { emulator::meet(emulator::block_meeting); }
FL_DEVICE int own_lane() { return emulator::current % emulator::LANES; }
FL_DEVICE float shuffle_xor(float v, int mask) { return emulator::from_lane(v, own_lane() ^ mask); }
FL_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return emulator::from_lane(v, own_lane() ^ mask); }
FL_DEVICE float shuffle(float v, int lane) { return emulator::from_lane(v, lane); }

// PTX prmt: each nibble of the selector names one of eight bytes; bit 3 (sign replication) is not used by the kernels.
FL_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}

template <class T>
FL_DEVICE T load(const void* p) {
    emulator::aligned(p, sizeof(T));
    T value;
    memcpy(&value, p, sizeof(T));
    return value;
}
template <class T>
FL_DEVICE void store(void* p, T value) {
    emulator::aligned(p, sizeof(T));
    memcpy(p, &value, sizeof(T));
    for (const emulator::Watched& each : emulator::watched) {
        const int64_t at = (char*)p - each.base;
        if (at >= 0 && at < each.bytes)
            for (size_t i = 0; i < sizeof(T); ++i) ++each.counts[at + (int64_t)i];
    }
}

// platform.h says what each lane holds. A lane needs rows g and g + 8 of a and columns 2t, 2t + 1 of b.
struct Operands {
    uint32_t a[4], b[2];
};
FL_BOTH float widen(uint16_t v, int64_t dtype);
template <class T>
FL_DEVICE double element(const unsigned char (*lanes)[emulator::SLOT], bool of_b, int line, int depth) {
    Operands held;
    const int lane = 4 * (line % 8) + depth % 8 / 2, half = depth / 8;
    memcpy(&held, lanes[lane], sizeof(held));
    const uint32_t word = of_b ? held.b[half] : held.a[2 * half + line / 8];
    return (double)widen((uint16_t)(word >> (16 * (depth % 2))), T::dtype);
}
template <class T>
FL_DEVICE void matrix_product(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    Operands own;
    memcpy(own.a, a, sizeof(own.a));
    memcpy(own.b, b, sizeof(own.b));
    const unsigned char(*lanes)[emulator::SLOT] = emulator::exchange(own);
    for (int i = 0; i < 4; ++i) {
        const int row = own_lane() / 4 + 8 * (i / 2), column = 2 * (own_lane() % 4) + i % 2;
        double sum = d[i];
        for (int depth = 0; depth < 16; ++depth)
            sum += element<T>(lanes, false, row, depth) * element<T>(lanes, true, column, depth);
        d[i] = (float)sum;
    }
}

template <class... P, class... A>
static int64_t launch(void (*kernel)(P...), dim3 grid, int threads, void*, A... args) {
    return emulator::run_grid(grid, threads, [=] { kernel(args...); });
}

#endif
