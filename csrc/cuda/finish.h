// The second launch of skinny.h and transposed.h: planes in their order, the low-rank term, DoRA's factor, bias.
#ifndef FASTLORA_CUDA_FINISH_H
#define FASTLORA_CUDA_FINISH_H

#include "device.h"

enum { FINISH_THREADS = 256, FINISH_COLS = 32, FINISH_TOKENS = 8, FINISH_RANK = 32 };

struct FinishShared {
    float h[FINISH_TOKENS][FINISH_RANK + 1];
    float factor[FINISH_COLS][FINISH_RANK + 1];
};

// What the finishing kernel adds: cols columns; the second factor, [cols, r] by rows or, transposed, [r, cols].
struct Finish {
    int64_t cols;
    const void* factor;
    int64_t transposed;
    float keep_scale;
};

// Ranks first .. first + 31 of h [8 tokens] and of the factor [32 columns]; 0 outside.
FL_DEVICE void stage_ranks(const Args& args, const Finish& finish, FinishShared& shared, int64_t token0, int64_t col0,
                           int64_t first) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t token = token0 + warp, rank = first + lane;
    float h = 0.0f;
    if (token < args.m && rank < args.r) {
        const float* plane = args.adapter_planes + token * args.r + rank;
        for (int64_t p = 0; p < args.splits; ++p) h += load<float>(plane + p * args.m * args.r);
        h *= finish.keep_scale;
        if (args.h && !blockIdx.x) store(args.h + token * args.r + rank, h);
    }
    shared.h[warp][lane] = h;
    FL_UNROLL
    for (int i = 0; i < FINISH_COLS; i += FINISH_TOKENS) {
        const int c = finish.transposed ? lane : warp + i, l = finish.transposed ? warp + i : lane;
        const int64_t col = col0 + c, rank_of = first + l;
        const int64_t at = finish.transposed ? rank_of * finish.cols + col : col * args.r + rank_of;
        const bool inside = col < finish.cols && rank_of < args.r;
        shared.factor[c][l] = inside ? read(finish.factor, args.adapter_dtype, at) : 0.0f;
    }
}

// z = Σ_p planes[p] + scale h factorᵀ in the order of p;  y = (mag / norm) ∘ z + bias: a warp a token, a lane a column.
FL_KERNEL(FINISH_THREADS, 4) finish_kernel(FL_ARGS Args args, FL_ARGS Finish finish) {
    FL_SHARED(FinishShared, shared);
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t col0 = (int64_t)blockIdx.x * FINISH_COLS, token0 = (int64_t)blockIdx.y * FINISH_TOKENS;
    const int64_t col = col0 + lane, token = token0 + warp;
    const bool inside = col < finish.cols && token < args.m;
    float low_rank = 0.0f, sum = 0.0f;
    for (int64_t first = 0; first < args.r; first += FINISH_RANK) {
        if (first) barrier();  // the last step's readers are done
        stage_ranks(args, finish, shared, token0, col0, first);
        barrier();
        FL_UNROLL
        for (int l = 0; l < FINISH_RANK; ++l) low_rank = fmaf(shared.h[warp][l], shared.factor[lane][l], low_rank);
    }
    if (!inside) return;
    const int64_t at = token * finish.cols + col;
    for (int64_t p = 0; p < args.splits; ++p) sum += load<float>(args.planes + p * args.m * finish.cols + at);
    sum = fmaf(low_rank, (float)args.scale, sum);
    if (args.z) write(args.z, args.dtype, at, sum);
    if (args.mag) sum *= read(args.mag, args.mag_dtype, col) / load<float>(args.norm + col);
    if (args.bias) sum += read(args.bias, args.bias_dtype, col);
    write(args.y, args.dtype, at, sum);
}

static int64_t launch_finish(const Args& args, const Finish& finish) {
    const dim3 grid((unsigned)ceil_div(finish.cols, FINISH_COLS), (unsigned)ceil_div(args.m, FINISH_TOKENS));
    return launch(finish_kernel, grid, FINISH_THREADS, args.stream, args, finish);
}

#endif
