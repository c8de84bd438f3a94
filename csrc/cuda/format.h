// Dequantize, dequantize + merge, quantize, dropout bits.
#ifndef FASTLORA_CUDA_FORMAT_H
#define FASTLORA_CUDA_FORMAT_H

#include "device.h"

enum { FORMAT_THREADS = 256, FORMAT_STEPS = 4 };

// out[i] = round(code[i] * absmax[i / blocksize]): eight elements a thread and step, those of neighbours side by side.
FL_KERNEL(FORMAT_THREADS, 4) dequantize_kernel(FL_ARGS Args args) {
    FL_SHARED(Tables, tables);
    fill_tables(args.weight, tables, FORMAT_THREADS);
    barrier();
    const Weight& w = args.weight;
    const int shift = shift_of(w.blocksize);
    const bool aligned = is_aligned(w.packed, 4) && is_aligned(args.y, 16);
    const int64_t first = (int64_t)blockIdx.x * FORMAT_THREADS * FORMAT_STEPS * 8 + (int64_t)threadIdx.x * 8;
    FL_UNROLL
    for (int step = 0; step < FORMAT_STEPS; ++step) {
        const int64_t flat = first + (int64_t)step * FORMAT_THREADS * 8, count = args.k - flat;
        if (count <= 0) return;
        const bool wide = aligned && count >= 8;
        float v[8];
        decode8(w, tables, shift, flat, wide, count, v);
        write8(args.y, args.dtype, flat, wide, count, v);
    }
}

// --- merge -----------------------------------------------------------------------------------------------------------

enum { MERGE_THREADS = 128, MERGE_ROWS = 32, MERGE_COLS = 128, MERGE_RANK = 16, MERGE_OWN = 4, MERGE_GROUPS = 16 };

struct MergeShared {
    float a[MERGE_RANK][MERGE_COLS];
    float b[MERGE_ROWS][MERGE_RANK];
};

FL_DEVICE void stage_factors(const Args& args, MergeShared& shared, int64_t row0, int64_t col0, int64_t first) {
    for (int i = (int)threadIdx.x; i < MERGE_RANK * MERGE_COLS; i += MERGE_THREADS) {
        const int64_t l = first + i / MERGE_COLS, col = col0 + i % MERGE_COLS;
        const bool inside = l < args.r && col < args.k;
        shared.a[i / MERGE_COLS][i % MERGE_COLS] = inside ? read(args.a, args.adapter_dtype, l * args.k + col) : 0.0f;
    }
    for (int i = (int)threadIdx.x; i < MERGE_ROWS * MERGE_RANK; i += MERGE_THREADS) {
        const int64_t row = row0 + i / MERGE_RANK, l = first + i % MERGE_RANK;
        const bool inside = l < args.r && row < args.n;
        shared.b[i / MERGE_RANK][i % MERGE_RANK] = inside ? read(args.b, args.adapter_dtype, row * args.r + l) : 0.0f;
    }
}

// sum_l b[i,l] a[l,j] of a tile of 32 x 128, in fp32, l ascending: a thread owns four rows, eight apart, of eight
// columns.
FL_DEVICE void low_rank_tile(const Args& args, MergeShared& shared, int64_t row0, int64_t col0,
                             float sum[MERGE_OWN][8]) {
    const int group = (int)threadIdx.x % MERGE_GROUPS, top = (int)threadIdx.x / MERGE_GROUPS;
    for (int64_t first = 0; first < args.r; first += MERGE_RANK) {
        barrier();  // the last step's readers are done
        stage_factors(args, shared, row0, col0, first);
        barrier();
        FL_UNROLL
        for (int l = 0; l < MERGE_RANK; ++l)
            FL_UNROLL
            for (int i = 0; i < MERGE_OWN; ++i) {
                const float b = shared.b[top + 8 * i][l];
                FL_UNROLL
                for (int j = 0; j < 8; ++j) sum[i][j] = fmaf(b, shared.a[l][8 * group + j], sum[i][j]);
            }
    }
}

// out[i,j] = round(c[i] (w[i,j] + scale sum_l b[i,l] a[l,j])), c = mag / norm or 1.
FL_KERNEL(MERGE_THREADS, 4) merge_kernel(FL_ARGS Args args) {
    FL_SHARED(Tables, tables);
    FL_SHARED(MergeShared, shared);
    const Weight& w = args.weight;
    fill_tables(w, tables, MERGE_THREADS);
    const int64_t row0 = (int64_t)blockIdx.y * MERGE_ROWS, col0 = (int64_t)blockIdx.x * MERGE_COLS;
    const int group = (int)threadIdx.x % MERGE_GROUPS, top = (int)threadIdx.x / MERGE_GROUPS;
    float sum[MERGE_OWN][8] = {};
    low_rank_tile(args, shared, row0, col0, sum);
    barrier();  // tables, where there is no adapter
    const int64_t col = col0 + 8 * group, count = args.k - col;
    if (count <= 0) return;
    const int shift = shift_of(w.blocksize);
    const bool wide = args.k % 8 == 0 && is_aligned(w.packed, 4) && is_aligned(args.y, 16);
    FL_UNROLL
    for (int i = 0; i < MERGE_OWN; ++i) {
        const int64_t row = row0 + top + 8 * i, flat = row * args.k + col;
        if (row >= args.n) break;
        float v[8];
        decode8(w, tables, shift, flat, wide, count, v);
        const float c = args.mag ? read(args.mag, args.mag_dtype, row) / load<float>(args.norm + row) : 1.0f;
        FL_UNROLL
        for (int j = 0; j < 8; ++j) v[j] = c * fmaf(sum[i][j], (float)args.scale, v[j]);
        write8(args.y, args.dtype, flat, wide, count, v);
    }
}

// out[i] = || w[i] + scale sum_l b[i,l] a[l] ||: 32 rows a block, tile after tile.
FL_KERNEL(MERGE_THREADS, 4) norm_kernel(FL_ARGS Args args) {
    FL_SHARED(Tables, tables);
    FL_SHARED(MergeShared, shared);
    const Weight& w = args.weight;
    fill_tables(w, tables, MERGE_THREADS);
    barrier();
    const int64_t row0 = (int64_t)blockIdx.x * MERGE_ROWS;
    const int group = (int)threadIdx.x % MERGE_GROUPS, top = (int)threadIdx.x / MERGE_GROUPS;
    const int shift = shift_of(w.blocksize);
    const bool wide = args.k % 8 == 0 && is_aligned(w.packed, 4);
    float squares[MERGE_OWN] = {};
    for (int64_t col0 = 0; col0 < args.k; col0 += MERGE_COLS) {
        float sum[MERGE_OWN][8] = {};
        low_rank_tile(args, shared, row0, col0, sum);
        const int64_t col = col0 + 8 * group, count = args.k - col;
        FL_UNROLL
        for (int i = 0; i < MERGE_OWN; ++i) {
            const int64_t row = row0 + top + 8 * i;
            if (row >= args.n || count <= 0) continue;
            float v[8], tile = 0.0f;
            decode8(w, tables, shift, row * args.k + col, wide, count, v);
            FL_UNROLL
            for (int j = 0; j < 8; ++j) {  // beyond k both are 0
                const float value = fmaf(sum[i][j], (float)args.scale, v[j]);
                tile = fmaf(value, value, tile);
            }
            squares[i] += tile;
        }
    }
    FL_UNROLL
    for (int i = 0; i < MERGE_OWN; ++i) {
        FL_UNROLL
        for (int mask = MERGE_GROUPS / 2; mask; mask >>= 1) squares[i] += shuffle_xor(squares[i], mask);
        const int64_t row = row0 + top + 8 * i;
        if (!group && row < args.n) store(args.out_scales + row, sqrtf(squares[i]));
    }
}

// --- quantize --------------------------------------------------------------------------------------------------------

enum { QUANTIZE_THREADS = 128 };
#define FL_TINY 1e-38f  // the smallest divisor

FL_BOTH float inverse_of(float absmax) { return 1.0f / (absmax < FL_TINY ? FL_TINY : absmax); }

// The code of x / absmax: how many decision points are below it; "not <=" sends NaN to the highest code.
FL_DEVICE uint32_t search(float v, bool fp4) {
    uint32_t below = 0;
    if (fp4) {
        const float magnitude = fabsf(v);
        FL_UNROLL
        for (int i = 0; i < 7; ++i) below += !(magnitude <= fl_fp4_mid[i]);
        return fl_fp4_order[below] | (v < 0.0f ? 8u : 0u);
    }
    FL_UNROLL
    for (int i = 0; i < 15; ++i) below += !(v <= fl_nf4_mid[i]);
    return below;
}

// A warp a block of weights: absmax = max|x|, NaN if any is; codes of x / max(absmax, 1e-38), two a byte.
FL_KERNEL(QUANTIZE_THREADS, 4) quantize_kernel(FL_ARGS Args args) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP;
    const int64_t blocksize = args.weight.blocksize;
    const int64_t block = (int64_t)blockIdx.x * (QUANTIZE_THREADS / LANES_OF_WARP) + (int)threadIdx.x / LANES_OF_WARP;
    const int64_t start = block * blocksize, end = min64(args.k, start + blocksize);
    uint32_t most = 0;  // as integers magnitudes are ordered, and NaN is above infinity
    for (int64_t i = start + lane; i < end; i += LANES_OF_WARP) {
        const uint32_t magnitude = bits_of(read(args.x, args.dtype, i)) & 0x7fffffffu;
        most = most < magnitude ? magnitude : most;
    }
    FL_UNROLL
    for (int mask = 16; mask; mask >>= 1) {
        const uint32_t other = shuffle_xor(most, mask);
        most = most < other ? other : most;
    }
    if (start >= end) return;
    const float absmax = float_of(most > 0x7f800000u ? 0x7fc00000u : most), inverse = inverse_of(absmax);
    if (!lane) store(args.out_scales + block, absmax);
    const bool fp4 = args.weight.kind == FP4;
    for (int64_t i = start + 2 * lane; i < end; i += 2 * LANES_OF_WARP) {
        const uint32_t high = search(read(args.x, args.dtype, i) * inverse, fp4);
        const uint32_t low = i + 1 < end ? search(read(args.x, args.dtype, i + 1) * inverse, fp4) : fp4 ? 0u : 7u;
        store(args.out_bytes + i / 2, (uint8_t)(high << 4 | low));
    }
}

enum { NESTED_WARPS = NESTED_BLOCKSIZE / LANES_OF_WARP };

struct NestedShared {
    float points[255];
    uint32_t most[NESTED_WARPS];
};

// A block a group of 256 scales x: absmax2 = max|x - offset|; codes of (x - offset) / max(absmax2, 1e-38), how many
// decision points of the dynamic map are below it.
FL_KERNEL(NESTED_BLOCKSIZE, 4) quantize_absmax_kernel(FL_ARGS Args args) {
    FL_SHARED(NestedShared, shared);
    const int me = (int)threadIdx.x;
    const int64_t at = (int64_t)blockIdx.x * NESTED_BLOCKSIZE + me;
    const float centred = at < args.k ? read(args.x, F32, at) - load<float>(args.weight.nested_offset) : 0.0f;
    if (me < 255) shared.points[me] = fl_dynamic_mid[me];
    uint32_t most = bits_of(centred) & 0x7fffffffu;  // as integers magnitudes are ordered, and NaN is above infinity
    FL_UNROLL
    for (int mask = 16; mask; mask >>= 1) {
        const uint32_t other = shuffle_xor(most, mask);
        most = most < other ? other : most;
    }
    if (me % LANES_OF_WARP == 0) shared.most[me / LANES_OF_WARP] = most;
    barrier();
    FL_UNROLL
    for (int i = 0; i < NESTED_WARPS; ++i) most = most < shared.most[i] ? shared.most[i] : most;
    const float absmax = float_of(most > 0x7f800000u ? 0x7fc00000u : most), v = centred * inverse_of(absmax);
    if (!me) store(args.out_scales + blockIdx.x, absmax);
    int below = 0;
    FL_UNROLL
    for (int step = 128; step; step >>= 1) below += !(v <= shared.points[below + step - 1]) ? step : 0;
    if (at < args.k) store(args.out_bytes + at, (uint8_t)below);
}

// Keep bits of x [m,k]: a thread a byte, bits beyond k are 0.
FL_KERNEL(FORMAT_THREADS, 4) dropout_mask_kernel(FL_ARGS Args args) {
    const int64_t groups = ceil_div(args.k, 8);
    const int64_t at = (int64_t)blockIdx.x * FORMAT_THREADS + (int64_t)threadIdx.x;
    if (at >= args.m * groups) return;
    const int64_t row = at / groups, group = at % groups;
    uint32_t bits = fl_keep_bits((uint64_t)load<int64_t>(args.seed), (uint32_t)args.stream_number, (uint64_t)row,
                                 (uint32_t)group, (uint32_t)args.threshold);
    if (args.k - 8 * group < 8) bits &= (1u << (args.k - 8 * group)) - 1;
    store(args.out_bytes + at, (uint8_t)bits);
}

#endif
