// What Python passes: one record of 8-byte fields, the same for every op. fastlora/backends/_cpu_library.py packs it in
// this order; change both together and raise FL_ABI_VERSION.
// Letters: x[m,k] w[n,k] a[r,k] b[n,r] y[m,n]. All tensors are contiguous; 0 stands for "absent".
#ifndef FASTLORA_CPU_ARGS_H
#define FASTLORA_CPU_ARGS_H

#include <stdint.h>

enum { FL_ABI_VERSION = 4 };
enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Kind : int64_t { DENSE = 0, NF4 = 1, FP4 = 2 };
enum TierId : int64_t { TIER_SCALAR = 0, TIER_AVX2 = 1, TIER_AVX512 = 2, TIER_AVX512_BF16 = 3, TIER_NEON = 4 };
enum Status : int64_t { FL_OK = 0, FL_NO_MEMORY = 1, FL_NO_TIER = 2 };

// Bits of fastlora.problem.
enum Flag : int64_t {
    BIAS = 1,
    DROPOUT = 2,
    DORA = 4,
    SHARED = 8,
    TRAIN = 16,
    NEED_DX = 32,
    NEED_DA = 64,
    NEED_DB = 128,
    NEED_DMAG = 256,
    NEED_DBIAS = 512,
    SAVE_MASK = 1024,
};

struct Args {
    int64_t m, n, k, r;
    int64_t dtype;  // of x, y, dy, dx, z and of a dense weight; for quantize the source's, for dequantize the output's
    int64_t flags;
    int64_t threads, tier;
    int64_t threshold;  // of the dropout decision
    int64_t stream;
    double scale;       // s
    double keep_scale;  // 65536 / (65536 - threshold), or 1
    const int64_t* seed;
    // the frozen weight
    int64_t kind, blocksize;
    const void* dense;
    const uint8_t* packed;
    const float* absmax;          // [blocks], or absent when nested
    const uint8_t* absmax_codes;  // [blocks], nested
    const float* nested_absmax;   // [ceil(blocks / 256)]
    const float* nested_offset;   // [1]
    const float* code;            // [16], or absent: the standard table of `kind`
    // activations and adapter, fp32 where not said otherwise
    const void* x;  // dtype
    const float *a, *b, *bias, *mag, *norm;
    void* y;         // dtype
    float* h;        // [m,r]
    uint8_t* mask;   // [m, ceil(k/8)]
    void* z;         // dtype [m,n]
    const void* dy;  // dtype [m,n]
    void* dx;        // dtype [m,k]
    float *da, *db, *dmag, *dbias;
    // quantize and friends
    uint8_t* out_bytes;
    float* out_scales;
};

// One adapter of a batch that mixes several, and such a call: 8-byte fields, a Grouped and behind it its Members.
struct Member {
    const void *a, *b;  // [r,k], [n,r] of the call's adapter_dtype
    const float *mag, *norm;  // DoRA's, or absent
    double scale, keep_scale;
    int64_t r;
    int64_t threshold, stream;  // of the dropout decision
    int64_t drops;              // p > 0
    int64_t drops_base;         // DoRA whose base product sees the dropped x
    void *da, *db;              // adapter_dtype, or absent
    float* dmag;
};
struct Grouped {
    Args args;  // r: the largest rank; h [m,r]
    int64_t groups, adapter_dtype;
    const int64_t *order, *offsets;  // rows sorted by adapter; groups + 1 borders
    const Member* members;           // set here: what lies behind the record
    const void* late;  // forward: dropped [m,n]; backward: dropped_dx [m,k]; dtype, or absent
};

// One linear with its experts' adapters, stacked; and a call on a gated MLP, or on one linear (`gate`; n is not used).
// 8-byte fields.
struct MixtureSide {
    const void *a, *b;  // [experts, r, in], [experts, out, r] of the call's adapter_dtype
    double scale;
    int64_t r;  // 0: no adapters
    float* h;   // [m slots, r]: the forward's result, which the backward reads
    void *da, *db;  // adapter_dtype, or absent
};
enum Act : int64_t { ACT_SILU = 0, ACT_GELU_TANH = 1 };
struct Mixture {
    Args args;  // m tokens, k in, n: the hidden rows' width, r: the largest rank; x, dy
    int64_t slots, out, experts, adapter_dtype, act;
    const int64_t *order, *offsets;  // rows (token * slots + slot) sorted by expert; experts + 1 borders
    const float* w;                  // [m, slots]
    const void *gate_base, *up_base, *d_hidden;  // dtype [m,n]: the base of both inputs with its bias; dy W2
    float *hidden, *y;               // forward: [m,n]; [m,out], added to
    float *d_gate, *d_up, *dx, *dw;  // backward: [m,n], [m,n]; [m,k], added to, or absent; [m,slots] or absent
    MixtureSide gate, up, down;
};

// One instruction tier's kernels. Each is called by every thread of a team (or by one thread alone).
struct Shared;
struct Phased {
    int64_t (*floats)(Shared&);  // shared scratch it needs
    void (*run)(Shared&);
};
struct Tier {
    void (*quantize)(const Args&, int64_t first_block, int64_t last_block);
    void (*quantize_absmax)(const Args&, int64_t first_group, int64_t last_group);
    void (*dequantize)(const Args&, int64_t first, int64_t last);  // flat elements, `first` on a block border
    void (*mask_rows)(const Args&, int64_t first_row, int64_t last_row, uint8_t* out);
    Phased forward, backward, norm;
    Phased grouped_forward, grouped_backward;  // Shared::args is the head of a Grouped
    Phased mixture_forward, mixture_backward;  // Shared::args is the head of a Mixture: an MLP
    Phased routed_forward, routed_backward;    // the same for one linear, `gate`
    void (*grouped_mask)(const Grouped&, int64_t first, int64_t last);  // sorted positions
    int64_t few;  // up to this many products of a token and the weight are not made by tiles
};

// State of one call, seen by all its threads.
struct Shared {
    const Args& args;
    int64_t failed;     // a thread found no memory
    float* memory;      // shared scratch
    int64_t* counters;  // one work counter a phase
};

const Tier* fl_tier_scalar();
const Tier* fl_tier_avx2();  // null where not compiled in
const Tier* fl_tier_avx512();
const Tier* fl_tier_avx512_bf16();
const Tier* fl_tier_neon();

// Scratch of the calling thread: grows, never shrinks, freed when the thread ends. 64-byte aligned; null without
// memory.
enum { SCRATCH_SHARED = 0, SCRATCH_THREAD = 1, SCRATCH_SLOTS = 2 };
float* fl_scratch(int slot, int64_t floats);

#endif
