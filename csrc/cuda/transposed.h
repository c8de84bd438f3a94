// dx of a few tokens, again two launches:
//
//   planes[p] = d[:, p] w[p, :]  and, by further blocks,  adapter_planes[p] = d[:, p] b[p, :],  d = (mag / norm) ∘ dy
//   dx = Σ_p planes[p] + s g a,   g = Σ_p adapter_planes[p]                                             (finish.h)
//
// where p is a slice of n. fp32 fused multiply-adds of decoded weights: a lane owns eight columns of k, so that packed
// bytes are read as in the forward; the warps of a block share its rows.
#ifndef FASTLORA_CUDA_TRANSPOSED_H
#define FASTLORA_CUDA_TRANSPOSED_H

#include "skinny.h"

enum { DX_THREADS = 256, DX_WARPS = 8, DX_COLS = 8 * LANES_OF_WARP, DX_ROWS = 64, DX_RANKS = 32 };

struct DxShared {
    Tables tables;
    float d[DX_ROWS][TOKENS];
    float sums[TOKENS][DX_COLS];
};

// d of 64 rows of w and 8 tokens, args.x being dy; 0 outside.
FL_DEVICE void stage_d(const Args& args, int64_t start, int64_t end, int64_t token0, DxShared& shared) {
    for (int i = (int)threadIdx.x; i < DX_ROWS * TOKENS; i += DX_THREADS) {
        const int64_t row = start + i % DX_ROWS, token = token0 + i / DX_ROWS;
        float v = 0.0f;
        if (row < end && token < args.m) {
            v = read(args.x, args.dtype, token * args.n + row);
            if (args.mag) v *= read(args.mag, args.mag_dtype, row) / load<float>(args.norm + row);
        }
        shared.d[i % DX_ROWS][i / DX_ROWS] = v;
    }
}

// The warps' sums, in their order, to planes[slice][8 tokens][256 columns].
FL_DEVICE void reduce_warps(const Args& args, DxShared& shared, const float sum[TOKENS][8], int64_t token0,
                            int64_t col0) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    for (int turn = 0; turn < DX_WARPS; ++turn) {
        if (turn == warp) {
            FL_UNROLL
            for (int token = 0; token < TOKENS; ++token)
                FL_UNROLL
                for (int j = 0; j < 8; ++j) {
                    float& to = shared.sums[token][LANES_OF_WARP * j + lane];
                    to = turn ? to + sum[token][j] : sum[token][j];
                }
        }
        barrier();
    }
    for (int i = (int)threadIdx.x; i < TOKENS * DX_COLS; i += DX_THREADS) {
        const int64_t token = token0 + i / DX_COLS, col = col0 + i % DX_COLS;
        if (token < args.m && col < args.k)
            store(args.planes + ((int64_t)blockIdx.y * args.m + token) * args.k + col,
                  shared.sums[i / DX_COLS][LANES_OF_WARP * (i % 8) + i % DX_COLS / 8]);
    }
}

FL_DEVICE void dx_block(const Args& args, DxShared& shared, int64_t block, int64_t token0, const Slice& slice) {
    const Weight& w = args.weight;
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t col0 = block * DX_COLS, col = col0 + 8 * lane;
    const int shift = shift_of(w.blocksize);
    const bool wide = args.k % 8 == 0 && is_aligned(w.packed, 4);
    fill_tables(w, shared.tables, DX_THREADS);
    float sum[TOKENS][8] = {};
    for (int64_t start = slice.first; start < slice.end; start += DX_ROWS) {
        barrier();  // the last rows' readers are done
        stage_d(args, start, slice.end, token0, shared);
        barrier();
        const int64_t end = min64(slice.end, start + DX_ROWS);
        for (int64_t row = start + warp; row < end && col < args.k; row += DX_WARPS) {
            float v[8];
            decode8(w, shared.tables, shift, row * args.k + col, wide, args.k - col, v);
            FL_UNROLL
            for (int token = 0; token < TOKENS; ++token)
                FL_UNROLL
                for (int j = 0; j < 8; ++j) sum[token][j] = fmaf(shared.d[row - start][token], v[j], sum[token][j]);
        }
    }
    reduce_warps(args, shared, sum, token0, col0);
}

// adapter_planes[slice][8 tokens][32 ranks]: a warp a token, a lane a rank.
FL_DEVICE void g_block(const Args& args, DxShared& shared, int64_t block, int64_t token0, const Slice& slice) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t rank = block * DX_RANKS + lane;
    float sum = 0.0f;
    for (int64_t start = slice.first; start < slice.end; start += DX_ROWS) {
        barrier();
        stage_d(args, start, slice.end, token0, shared);
        barrier();
        const int64_t end = min64(slice.end, start + DX_ROWS);
        for (int64_t row = start; row < end && rank < args.r; ++row)
            sum = fmaf(shared.d[row - start][warp], read(args.b, args.adapter_dtype, row * args.r + rank), sum);
    }
    if (rank < args.r && token0 + warp < args.m)
        store(args.adapter_planes + ((int64_t)blockIdx.y * args.m + token0 + warp) * args.r + rank, sum);
}

FL_KERNEL(DX_THREADS, 2) transposed_kernel(FL_ARGS Args args) {
    FL_SHARED(DxShared, shared);
    const int64_t blocks = ceil_div(args.k, DX_COLS), token0 = (int64_t)blockIdx.z * TOKENS;
    const Slice slice = slice_of(args.n, DX_ROWS, args.splits, blockIdx.y);
    if ((int64_t)blockIdx.x < blocks) dx_block(args, shared, blockIdx.x, token0, slice);
    else g_block(args, shared, (int64_t)blockIdx.x - blocks, token0, slice);
}

static int64_t launch_transposed(const Args& args) {
    const dim3 grid((unsigned)(ceil_div(args.k, DX_COLS) + ceil_div(args.r, DX_RANKS)), (unsigned)args.splits,
                    (unsigned)ceil_div(args.m, TOKENS));
    return launch(transposed_kernel, grid, DX_THREADS, args.stream, args);
}

#endif
