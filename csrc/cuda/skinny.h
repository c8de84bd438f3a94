// A few tokens: bound by reading the packed weight. Two launches an adapted layer:
//
//   planes[p] = x[:, p] w[:, p]ᵀ   and, by further blocks of it,   adapter_planes[p] = drop(x)[:, p] a[:, p]ᵀ
//   y = c ∘ (Σ_p planes[p] + s h bᵀ) + bias,   h = keep_scale Σ_p adapter_planes[p]                     (finish.h)
//
// where p is a slice of k. With x of 16 bits the product runs on tensor cores: the sixteen values of a code, rounded to
// the type of x, are looked up in registers by byte permutations, and a block's scale multiplies the block's sum.
// Otherwise (fp32; k no multiple of 64 or of the blocksize) it is made of fp32 fused multiply-adds of decoded weights.
#ifndef FASTLORA_CUDA_SKINNY_H
#define FASTLORA_CUDA_SKINNY_H

#include "device.h"

enum {
    SKINNY_THREADS = 128,
    SKINNY_WARPS = 4,
    MMA_ROWS = 16 * SKINNY_WARPS,  // of w a block
    CHUNK = 256,                   // columns whose packed words a warp loads at once, before it needs them
    STEP = 64,                     // columns a warp multiplies with one load of a lane
    STEPS = CHUNK / STEP,
    TOKENS = 8,  // of a block without tensor cores
    ADAPTER_TOKENS = 4,
    RANKS_OF_WARP = 4,
    ADAPTER_RANKS = RANKS_OF_WARP * SKINNY_WARPS,
};

// Columns first .. end - 1 are a slice.
struct Slice {
    int64_t first, end;
};
FL_DEVICE Slice slice_of(int64_t total, int64_t unit, int64_t splits, int64_t index) {
    const int64_t size = ceil_div(ceil_div(total, unit), splits) * unit;
    return {min64(total, index * size), min64(total, (index + 1) * size)};
}

FL_DEVICE float warp_sum(float v) {
    FL_UNROLL
    for (int mask = 16; mask; mask >>= 1) v += shuffle_xor(v, mask);
    return v;
}

// --- h = drop(x) aᵀ --------------------------------------------------------------------------------------------------

// The keep bits of eight columns of a token, saved where `save`.
FL_DEVICE uint32_t draw_keep(const Args& args, int64_t token, int64_t col, bool save) {
    uint32_t bits = fl_keep_bits((uint64_t)load<int64_t>(args.seed), (uint32_t)args.stream_number, (uint64_t)token,
                                 (uint32_t)(col / 8), (uint32_t)args.threshold);
    if (args.k - col < 8) bits &= (1u << (args.k - col)) - 1;
    if (save) store(args.out_bytes + token * ceil_div(args.k, 8) + col / 8, (uint8_t)bits);
    return bits;
}

// adapter_planes[slice][4 tokens][16 ranks]: a warp takes four rows of a, its lanes eight columns each at a time. Not
// inlined: a dozen kernels would each compile a copy.
FL_NOINLINE void adapter_block(const Args& args, int64_t index) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP, warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t rank_tiles = ceil_div(args.r, ADAPTER_RANKS), token0 = index / rank_tiles * ADAPTER_TOKENS;
    const int64_t rank0 = index % rank_tiles * ADAPTER_RANKS + warp * RANKS_OF_WARP;
    const int64_t tokens = min64(ADAPTER_TOKENS, args.m - token0), ranks = min64(RANKS_OF_WARP, args.r - rank0);
    const Slice slice = slice_of(args.k, CHUNK, args.splits, blockIdx.y);
    const bool wide_x = args.k % 8 == 0 && is_aligned(args.x, 16), wide_a = args.k % 8 == 0 && is_aligned(args.a, 16);
    const bool save = args.out_bytes && index % rank_tiles == 0 && warp == 0;
    float sum[RANKS_OF_WARP][ADAPTER_TOKENS] = {};
    for (int64_t col = slice.first + 8 * lane; col < slice.end; col += 8 * LANES_OF_WARP) {
        const int64_t count = args.k - col;
        float a[RANKS_OF_WARP][8] = {};
        FL_UNROLL
        for (int i = 0; i < RANKS_OF_WARP; ++i)
            if (i < ranks) read8(args.a, args.adapter_dtype, (rank0 + i) * args.k + col, wide_a, count, a[i]);
        FL_UNROLL
        for (int token = 0; token < ADAPTER_TOKENS; ++token) {
            if (token >= tokens) continue;
            float x[8];
            read8(args.x, args.dtype, (token0 + token) * args.k + col, wide_x, count, x);
            const uint32_t keep = args.seed ? draw_keep(args, token0 + token, col, save) : 0xffu;
            FL_UNROLL
            for (int j = 0; j < 8; ++j) {
                const float kept = keep >> j & 1 ? x[j] : 0.0f;
                FL_UNROLL
                for (int i = 0; i < RANKS_OF_WARP; ++i) sum[i][token] = fmaf(kept, a[i][j], sum[i][token]);
            }
        }
    }
    FL_UNROLL
    for (int i = 0; i < RANKS_OF_WARP; ++i)
        FL_UNROLL
        for (int token = 0; token < ADAPTER_TOKENS; ++token) {
            const float whole = warp_sum(sum[i][token]);
            const int64_t at = (int64_t)blockIdx.y * args.m + token0 + token;
            if (i < ranks && token < tokens && lane == token)
                store(args.adapter_planes + at * args.r + rank0 + i, whole);
        }
}

FL_BOTH int64_t adapter_blocks(const Args& args) {
    return ceil_div(args.r, ADAPTER_RANKS) * ceil_div(args.m, ADAPTER_TOKENS);
}

// --- x wᵀ on tensor cores --------------------------------------------------------------------------------------------

// The sixteen values in 16 bits, for look-up by byte permutation: the high bytes of codes 0..15, then the low bytes.
template <class T>
FL_DEVICE void code_words(const Weight& w, uint32_t words[8]) {
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = narrow_pair(code_value(w, 4 * i), code_value(w, 4 * i + 1), T::dtype);
        const uint32_t high = narrow_pair(code_value(w, 4 * i + 2), code_value(w, 4 * i + 3), T::dtype);
        words[i] = permute(low, high, 0x7531);
        words[4 + i] = permute(low, high, 0x6420);
    }
}

// Four packed bytes, elements 0..7 -> {0,2}, {4,6}, {1,3}, {5,7} in 16 bits each. A nibble is a selector as it is: its
// low three bits find a byte among eight codes, bit 3 then chooses between the finds of both halves of the table.
FL_DEVICE void decode_word(uint32_t bytes, const uint32_t words[8], uint32_t out[4]) {
    uint32_t code = bytes & 0x77777777u, pick = (bytes >> 1 & 0x44444444u) | 0x32103210u;
    FL_UNROLL
    for (int half = 0; half < 2; ++half) {
        const uint32_t high = permute(permute(words[0], words[1], code), permute(words[2], words[3], code), pick);
        const uint32_t low = permute(permute(words[4], words[5], code), permute(words[6], words[7], code), pick);
        out[half] = permute(low, high, 0x7351);
        out[2 + half] = permute(low, high, 0x6240);
        code >>= 16;
        pick >>= 16;
    }
}

// x [8 TILES tokens, SPAN columns] in shared memory, where few tokens leave room for more columns.
template <int TILES>
struct MmaShared {
    enum {
        SPAN = CHUNK * (TILES == 1 ? 4 : TILES == 2 ? 2 : 1),
        STRIDE = SPAN / 8 + 1,  // of a token, in 16 bytes: odd, so that eight lanes meet eight banks
    };
    uint4 x[8 * TILES * STRIDE];
    float map[256];
};

// Eight columns in the order that decode_word leaves; 0 outside.
template <int TILES>
FL_DEVICE void stage_x(const Args& args, int64_t start, int64_t end, MmaShared<TILES>& shared) {
    enum { SPAN = MmaShared<TILES>::SPAN, GROUPS = SPAN / 8 };
    const uint16_t* x = (const uint16_t*)args.x + start;
    const int count = (int)(end - start < SPAN ? end - start : SPAN), tokens = (int)args.m;
    FL_UNROLL
    for (int i = 0; i < 8 * TILES * GROUPS / SKINNY_THREADS; ++i) {
        const int at = i * SKINNY_THREADS + (int)threadIdx.x, token = at / GROUPS, group = at % GROUPS;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < tokens && 8 * group < count) v = load<uint4>(x + token * args.k + 8 * group);
        shared.x[token * MmaShared<TILES>::STRIDE + group] =
            make_uint4(permute(v.x, v.y, 0x5410), permute(v.z, v.w, 0x5410), permute(v.x, v.y, 0x7632),
                       permute(v.z, v.w, 0x7632));
    }
}

// What a lane needs of two rows of w, eight apart, for one chunk: of each step of 64 columns two words; the scales of
// step t. Where a block has 32 columns (FINE), the row's four lanes take one word of each; else neighbouring words.
struct Chunk {
    uint32_t words[STEPS][2][2];  // [step][word][row]
    float scales[2][2];           // [block][row]
};
template <bool FINE>
FL_DEVICE int word_of(int t, int j) {
    return FINE ? 4 * j + t : 2 * t + j;
}

template <bool FINE>
FL_DEVICE void load_chunk(const Weight& w, const float* map, const uint64_t rows[2], int shift, int64_t start,
                          int64_t end, Chunk& chunk) {
    const int t = (int)threadIdx.x % 4, steps = (int)((min64(end, start + CHUNK) - start) / STEP);
    FL_UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint64_t flat = rows[i] + (uint64_t)start;
        const uint8_t* p = w.packed + flat / 2 + (FINE ? 4 : 8) * t;
        FL_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            if (step >= steps) continue;
            if (FINE) {
                chunk.words[step][0][i] = load<uint32_t>(p + STEP / 2 * step);
                chunk.words[step][1][i] = load<uint32_t>(p + STEP / 2 * step + 16);
            } else {
                const uint2 both = load<uint2>(p + STEP / 2 * step);
                chunk.words[step][0][i] = both.x;
                chunk.words[step][1][i] = both.y;
            }
        }
        if (t >= steps) continue;
        chunk.scales[0][i] = scale_of(w, map, (int64_t)((flat + STEP * t) >> shift));
        if (FINE) chunk.scales[1][i] = scale_of(w, map, (int64_t)((flat + STEP * t + 32) >> shift));
    }
}

// acc[tile] += scale ∘ (w xᵀ) over one chunk; x: its first columns of token 0.
template <class T, int TILES, bool FINE>
FL_DEVICE void multiply_chunk(const Chunk& chunk, const uint32_t words[8], int steps, const uint4* x,
                              float acc[TILES][4]) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP, g = lane / 4, t = lane % 4;
    FL_UNROLL
    for (int step = 0; step < STEPS; ++step) {
        if (step >= steps) break;
        float part[TILES][4] = {};
        FL_UNROLL
        for (int j = 0; j < 2; ++j) {
            uint32_t low[4], high[4];
            decode_word(chunk.words[step][j][0], words, low);
            decode_word(chunk.words[step][j][1], words, high);
            const uint32_t even[4] = {low[0], high[0], low[1], high[1]}, odd[4] = {low[2], high[2], low[3], high[3]};
            FL_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                const uint4 v = x[(8 * tile + g) * MmaShared<TILES>::STRIDE + 8 * step + word_of<FINE>(t, j)];
                const uint32_t first[2] = {v.x, v.y}, second[2] = {v.z, v.w};
                matrix_product<T>(part[tile], even, first);
                matrix_product<T>(part[tile], odd, second);
            }
            if (!FINE && j == 0) continue;  // the block's other half comes first
            const float own = shuffle(chunk.scales[FINE ? j : 0][0], 4 * g + step);
            const float far = shuffle(chunk.scales[FINE ? j : 0][1], 4 * g + step);
            FL_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
                FL_UNROLL
                for (int i = 0; i < 4; ++i) {
                    acc[tile][i] = fmaf(part[tile][i], i < 2 ? own : far, acc[tile][i]);
                    part[tile][i] = 0.0f;
                }
            }
        }
    }
}

// planes[slice] of 64 rows of w, all tokens; k is a multiple of 64 and of the blocksize, x and packed aligned.
template <class T, int TILES, bool FINE>
FL_DEVICE void mma_block(const Args& args, MmaShared<TILES>& shared, int64_t block) {
    const Weight& w = args.weight;
    const int lane = (int)threadIdx.x % LANES_OF_WARP, g = lane / 4, t = lane % 4;
    const int warp = (int)threadIdx.x / LANES_OF_WARP;
    const int64_t row0 = block * MMA_ROWS + 16 * warp + g, last = args.n - 1;  // what has no row is not stored
    const uint64_t rows[2] = {(uint64_t)(min64(row0, last) * args.k), (uint64_t)(min64(row0 + 8, last) * args.k)};
    const Slice slice = slice_of(args.k, CHUNK, args.splits, blockIdx.y);
    const int shift = shift_of(w.blocksize);
    uint32_t words[8];
    code_words<T>(w, words);
    if (!w.absmax)
        for (int i = (int)threadIdx.x; i < 256; i += SKINNY_THREADS) shared.map[i] = fl_dynamic_map[i];
    barrier();
    float acc[TILES][4] = {};
    Chunk chunk = {}, next = {};
    if (slice.first < slice.end) load_chunk<FINE>(w, shared.map, rows, shift, slice.first, slice.end, next);
    for (int64_t span = slice.first; span < slice.end; span += MmaShared<TILES>::SPAN) {
        if (span > slice.first) barrier();  // the last span's readers are done
        stage_x<TILES>(args, span, slice.end, shared);
        barrier();
        const int64_t end = min64(slice.end, span + MmaShared<TILES>::SPAN);
        for (int64_t start = span; start < end; start += CHUNK) {
            chunk = next;
            if (start + CHUNK < slice.end)
                load_chunk<FINE>(w, shared.map, rows, shift, start + CHUNK, slice.end, next);
            const int steps = (int)((min64(end, start + CHUNK) - start) / STEP);
            multiply_chunk<T, TILES, FINE>(chunk, words, steps, shared.x + (int)(start - span) / 8, acc);
        }
    }
    FL_UNROLL
    for (int tile = 0; tile < TILES; ++tile)
        FL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + 8 * (i / 2), token = 8 * tile + 2 * t + i % 2;
            if (row < args.n && token < args.m)
                store(args.planes + ((int64_t)blockIdx.y * args.m + token) * args.n + row, acc[tile][i]);
        }
}

// --- x wᵀ without ----------------------------------------------------------------------------------------------------

// planes[slice][8 tokens]: a warp a row of w, its lanes eight columns each at a time.
template <class T>
FL_DEVICE void plain_block(const Args& args, Tables& tables, int64_t block) {
    const Weight& w = args.weight;
    const int lane = (int)threadIdx.x % LANES_OF_WARP;
    fill_tables(w, tables, SKINNY_THREADS);
    barrier();
    const int64_t row = block * SKINNY_WARPS + (int)threadIdx.x / LANES_OF_WARP, token0 = (int64_t)blockIdx.z * TOKENS;
    const int64_t tokens = min64(TOKENS, args.m - token0);
    const Slice slice = slice_of(args.k, CHUNK, args.splits, blockIdx.y);
    const int shift = shift_of(w.blocksize);
    const bool wide_w = args.k % 8 == 0 && is_aligned(w.packed, 4), wide_x = args.k % 8 == 0 && is_aligned(args.x, 16);
    float sum[TOKENS] = {};
    if (row >= args.n) return;
    for (int64_t col = slice.first + 8 * lane; col < slice.end; col += 8 * LANES_OF_WARP) {
        float v[8], x[8];
        decode8(w, tables, shift, row * args.k + col, wide_w, args.k - col, v);
        FL_UNROLL
        for (int token = 0; token < TOKENS; ++token) {
            if (token >= tokens) continue;
            read8(args.x, T::dtype, (token0 + token) * args.k + col, wide_x, args.k - col, x);
            FL_UNROLL
            for (int j = 0; j < 8; ++j) sum[token] = fmaf(x[j], v[j], sum[token]);
        }
    }
    FL_UNROLL
    for (int token = 0; token < TOKENS; ++token) {
        const float whole = warp_sum(sum[token]);
        if (token < tokens && lane == token)
            store(args.planes + ((int64_t)blockIdx.y * args.m + token0 + token) * args.n + row, whole);
    }
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// Blocks a multiprocessor: as many as leave every architecture's compiler enough registers.
constexpr int mma_blocks(int tiles, bool fine) {
    return tiles == 1 ? 4 : tiles == 2 || (tiles == 4 && !fine) ? 3 : 2;
}

template <class T, int TILES, bool FINE>
FL_KERNEL(SKINNY_THREADS, mma_blocks(TILES, FINE)) skinny_mma_kernel(FL_ARGS Args args) {
    FL_SHARED(MmaShared<TILES>, shared);
    const int64_t blocks = ceil_div(args.n, MMA_ROWS);
    if ((int64_t)blockIdx.x < blocks) mma_block<T, TILES, FINE>(args, shared, blockIdx.x);
    else adapter_block(args, (int64_t)blockIdx.x - blocks);
}

template <class T>
FL_KERNEL(SKINNY_THREADS, 4) skinny_plain_kernel(FL_ARGS Args args) {
    FL_SHARED(Tables, tables);
    const int64_t blocks = ceil_div(args.n, SKINNY_WARPS);
    if ((int64_t)blockIdx.x < blocks) plain_block<T>(args, tables, blockIdx.x);
    else if (!blockIdx.z) adapter_block(args, (int64_t)blockIdx.x - blocks);
}

// --- launching -------------------------------------------------------------------------------------------------------

FL_BOTH bool uses_matrix_units(const Args& args) {
    return args.k % STEP == 0 && args.k % args.weight.blocksize == 0 && is_aligned(args.x, 16) &&
           is_aligned(args.weight.packed, 8);
}

template <class T, int TILES>
static int64_t launch_mma(const Args& args) {
    const dim3 grid((unsigned)(ceil_div(args.n, MMA_ROWS) + adapter_blocks(args)), (unsigned)args.splits);
    if (args.weight.blocksize == 32)
        return launch(skinny_mma_kernel<T, TILES, true>, grid, SKINNY_THREADS, args.stream, args);
    return launch(skinny_mma_kernel<T, TILES, false>, grid, SKINNY_THREADS, args.stream, args);
}

template <class T>
static int64_t launch_plain(const Args& args) {
    const dim3 grid((unsigned)(ceil_div(args.n, SKINNY_WARPS) + adapter_blocks(args)), (unsigned)args.splits,
                    (unsigned)ceil_div(args.m, TOKENS));
    return launch(skinny_plain_kernel<T>, grid, SKINNY_THREADS, args.stream, args);
}

template <class T>
static int64_t launch_skinny(const Args& args) {
    if constexpr ((int)T::dtype != (int)F32) {
        if (uses_matrix_units(args)) {
            if (args.m <= 8) return launch_mma<T, 1>(args);
            if (args.m <= 16) return launch_mma<T, 2>(args);
            return args.m <= 32 ? launch_mma<T, 4>(args) : launch_mma<T, 8>(args);
        }
    }
    return launch_plain<T>(args);
}

#endif
