// The C ABI: picks the tier, makes scratch, starts one team of threads an op. Compiled for the baseline only.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "args.h"

#define FL_API extern "C" __attribute__((visibility("default")))

namespace {

struct Buffer {
    float* data = nullptr;
    int64_t floats = 0;  // it can hold
    int64_t asked = 0;   // at most, so far
    ~Buffer() { free(data); }
};
thread_local Buffer buffers[SCRATCH_SLOTS];

const Tier* compiled(int64_t tier) {
    switch (tier) {
        case TIER_AVX512_BF16:
            return fl_tier_avx512_bf16();
        case TIER_AVX512:
            return fl_tier_avx512();
        case TIER_AVX2:
            return fl_tier_avx2();
        case TIER_NEON:
            return fl_tier_neon();
        case TIER_SCALAR:
            return fl_tier_scalar();
        default:
            return nullptr;
    }
}

bool cpu_has(int64_t tier) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (tier) {
        case TIER_AVX512_BF16:
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
            return avx512 && __builtin_cpu_supports("avx512bf16");
#else
            return false;
#endif
        case TIER_AVX512:
            return avx512;
        case TIER_AVX2:
            return avx2;
        default:
            return tier == TIER_SCALAR;
    }
#elif defined(__aarch64__)
    return tier == TIER_SCALAR || tier == TIER_NEON;
#else
    return tier == TIER_SCALAR;
#endif
}

int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// A thread for every 2^20 units of work: below that, waking it costs more than it saves.
int64_t team_size(const Args& args, double units) {
    const double useful = 1.0 + units / (1 << 20);
    return useful < (double)args.threads ? (int64_t)useful : args.threads;
}

// body(first, last) over [0, total) in slices of `grain`, shared out evenly.
template <class Body>
void slices(int64_t threads, int64_t total, int64_t grain, const Body& body) {
    const int64_t pieces = (total + grain - 1) / grain;
    if (threads > pieces) threads = pieces;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
        {
            const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
            const int64_t first = pieces * me / team * grain, last = min64(total, pieces * (me + 1) / team * grain);
            if (first < last) body(first, last);
        }
        return;
    }
#endif
    if (total > 0) body(0, total);
}

// An empty tensor has no address, but copies of nothing from it need one. What may be absent stays so.
void name_the_empty(Args& args) {
    static float nothing[16];
    for (const void** p : {&args.x, &args.dy, &args.dense})
        if (!*p) *p = nothing;
    for (const float** p : {&args.a, &args.b})
        if (!*p) *p = nothing;
    for (void** p : {&args.y, &args.dx})
        if (!*p) *p = nothing;
    for (float** p : {&args.da, &args.db, &args.dmag, &args.dbias})
        if (!*p) *p = nothing;
}

int64_t start_team(Args& args, Phased Tier::*op, double units) {
    const Tier* tier = compiled(args.tier);
    if (!tier || !cpu_has(args.tier)) return FL_NO_TIER;
    args.threads = team_size(args, units);
    Shared shared{args, 0, nullptr, nullptr};
    const int64_t counters = 16 + 2 * (args.m / 256 + 1);
    const int64_t floats = (tier->*op).floats(shared);
    float* memory = fl_scratch(SCRATCH_SHARED, floats + 2 * counters);
    if (!memory) return FL_NO_MEMORY;
    shared.counters = (int64_t*)memory;
    memset(shared.counters, 0, (size_t)counters * 8);
    shared.memory = memory + (2 * counters + 15) / 16 * 16;
#ifdef _OPENMP
    if (args.threads > 1) {
#pragma omp parallel num_threads((int)args.threads)
        (tier->*op).run(shared);
        return shared.failed ? FL_NO_MEMORY : FL_OK;
    }
#endif
    (tier->*op).run(shared);
    return shared.failed ? FL_NO_MEMORY : FL_OK;
}

int64_t run_team(const Args* given, Phased Tier::*op, double units) {
    Args args = *given;
    name_the_empty(args);
    return start_team(args, op, units);
}

Grouped whole(const Grouped* given) {
    Grouped call = *given;
    call.members = (const Member*)(given + 1);
    return call;
}

// Products of rows and adapters, and the adapters' own bytes, which bound a few rows.
double grouped_units(const Grouped& call) {
    const double size = (double)call.args.r * (double)(call.args.n + call.args.k);
    return size * ((double)call.args.m / 4 + (double)call.groups);
}

}  // namespace

__attribute__((visibility("hidden"))) float* fl_scratch(int slot, int64_t floats) {
    Buffer& buffer = buffers[slot];
    if (floats > buffer.asked) buffer.asked = floats;
    if (buffer.floats < floats || !buffer.data) {
        free(buffer.data);
        buffer.data = nullptr;
        buffer.floats = 0;
        // The matrix kernels walk through this memory at once: with small pages the TLB costs them up to a tenth.
        const size_t huge = 2u << 20, wanted = (size_t)(floats + 64) * 4;
        const size_t align = wanted >= huge / 16 ? huge : 64, bytes = (wanted + align - 1) / align * align;
        void* data = nullptr;
        if (posix_memalign(&data, align, bytes)) return nullptr;
#if defined(MADV_HUGEPAGE)
        if (align == huge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
        memset(data, 0, bytes);  // padding rows are multiplied, never used: keep them from being denormal
        buffer.data = (float*)data;
        buffer.floats = (int64_t)(bytes / 4) - 64;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(buffer.data, (size_t)(buffer.floats + 64) * 4);  // `Arena` cuts it anew
#endif
    return buffer.data;
}

FL_API int64_t fl_abi_version() { return FL_ABI_VERSION; }
FL_API int64_t fl_args_bytes() { return (int64_t)sizeof(Args); }

// The most scratch that calls from this thread have asked for, shared and its own. Large buffers are rounded up to
// pages of 2 MiB on top.
FL_API int64_t fl_scratch_bytes() {
    int64_t bytes = 0;
    for (const Buffer& buffer : buffers) bytes += buffer.asked * 4;
    return bytes;
}

// 1 if this CPU can run the tier and the library holds it.
FL_API int64_t fl_has_tier(int64_t tier) { return cpu_has(tier) && compiled(tier) != nullptr; }

// Up to how many tokens that meet the weight the tier has its own kernels (few_fwd.h, few_bwd.h).
FL_API int64_t fl_few_tokens(int64_t tier) { return fl_has_tier(tier) ? compiled(tier)->few : 0; }

FL_API int64_t fl_quantize(const Args* args) {
    const Tier* tier = compiled(args->tier);
    if (!tier || !cpu_has(args->tier)) return FL_NO_TIER;
    const int64_t blocks = (args->k + args->blocksize - 1) / args->blocksize;
    slices(team_size(*args, (double)args->k * 8), blocks, 64,
           [&](int64_t first, int64_t last) { tier->quantize(*args, first, last); });
    return FL_OK;
}

FL_API int64_t fl_quantize_absmax(const Args* args) {
    const Tier* tier = compiled(args->tier);
    if (!tier || !cpu_has(args->tier)) return FL_NO_TIER;
    slices(team_size(*args, (double)args->k * 32), (args->k + 255) / 256, 16,
           [&](int64_t first, int64_t last) { tier->quantize_absmax(*args, first, last); });
    return FL_OK;
}

FL_API int64_t fl_dequantize(const Args* args) {
    const Tier* tier = compiled(args->tier);
    if (!tier || !cpu_has(args->tier)) return FL_NO_TIER;
    slices(team_size(*args, (double)args->k), args->k, args->blocksize * 64,
           [&](int64_t first, int64_t last) { tier->dequantize(*args, first, last); });
    return FL_OK;
}

FL_API int64_t fl_dropout_mask(const Args* args) {
    const Tier* tier = compiled(args->tier);
    if (!tier || !cpu_has(args->tier)) return FL_NO_TIER;
    const int64_t bytes = (args->k + 7) / 8;
    slices(team_size(*args, (double)args->m * (double)args->k), args->m, 1,
           [&](int64_t first, int64_t last) { tier->mask_rows(*args, first, last, args->mask + first * bytes); });
    return FL_OK;
}

FL_API int64_t fl_dora_norm(const Args* args) {
    return run_team(args, &Tier::norm, (double)args->n * (double)args->k * (double)(args->r / 16 + 1));
}

FL_API int64_t fl_lora_fwd(const Args* args) {
    const double m = args->m < 4 ? 4 : (double)args->m;
    return run_team(args, &Tier::forward, m * (double)args->n * (double)args->k / 4);
}

FL_API int64_t fl_lora_bwd(const Args* args) {
    const double m = args->m < 4 ? 4 : (double)args->m;
    return run_team(args, &Tier::backward, m * (double)args->n * (double)args->k / 4);
}

FL_API int64_t fl_grouped_fwd(const Grouped* given) {
    Grouped call = whole(given);
    return start_team(call.args, &Tier::grouped_forward, grouped_units(call));
}

FL_API int64_t fl_grouped_bwd(const Grouped* given) {
    Grouped call = whole(given);
    return start_team(call.args, &Tier::grouped_backward, 2 * grouped_units(call));
}

// Products of rows and adapters: both ends of every linear.
static double mixture_units(const Mixture& call) {
    const Args& args = call.args;
    const double ends = (double)(2 * args.k + 3 * args.n + call.out);
    return (double)(args.m * call.slots) * (double)args.r * ends / 4;
}

static int64_t start_mixture(const Mixture* given, Phased Tier::*op, double passes) {
    Mixture call = *given;
    static float nothing[16];
    for (MixtureSide* side : {&call.gate, &call.up, &call.down})
        if (!side->r) side->a = side->b = nothing;
    return start_team(call.args, op, passes * mixture_units(call));
}

FL_API int64_t fl_mixture_fwd(const Mixture* given) { return start_mixture(given, &Tier::mixture_forward, 1); }
FL_API int64_t fl_mixture_bwd(const Mixture* given) { return start_mixture(given, &Tier::mixture_backward, 2); }
FL_API int64_t fl_routed_fwd(const Mixture* given) { return start_mixture(given, &Tier::routed_forward, 1); }
FL_API int64_t fl_routed_bwd(const Mixture* given) { return start_mixture(given, &Tier::routed_backward, 2); }

FL_API int64_t fl_grouped_mask(const Grouped* given) {
    const Grouped call = whole(given);
    const Args& args = call.args;
    const Tier* tier = compiled(args.tier);
    if (!tier || !cpu_has(args.tier)) return FL_NO_TIER;
    slices(team_size(args, (double)args.m * (double)args.k), args.m, 1,
           [&](int64_t first, int64_t last) { tier->grouped_mask(call, first, last); });
    return FL_OK;
}

// A fresh output is dominated by page faults: ask for huge pages on the whole ones inside it.
FL_API void fl_advise_huge(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t huge = 2u << 20, first = ((uintptr_t)data + huge - 1) / huge * huge;
    const uintptr_t last = ((uintptr_t)data + (uintptr_t)bytes) / huge * huge;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}
