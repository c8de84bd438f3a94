// How a call is cut into pieces: panels of tokens, chunks of panels, scratch. Which thread takes a piece never changes
// the arithmetic, so results are bitwise equal for every number of threads.
#ifndef FASTLORA_CPU_TEAM_H
#define FASTLORA_CPU_TEAM_H

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

// Cuts one allocation into 64-byte aligned arrays; with a null base it only adds up the size. Under AddressSanitizer
// what lies between them must not be touched.
struct Arena {
    float* base;
    int64_t used;
    explicit Arena(float* b) : base(b), used(0) {}
    float* take(int64_t floats) {
        float* p = base ? base + used : nullptr;
        used += round_up(floats, 16);
#if defined(__SANITIZE_ADDRESS__)
        used += 16;
        if (p) __asan_poison_memory_region(p + floats, (size_t)(base + used - p - floats) * 4);
#endif
        return p;
    }
};

// Tokens of one pass over the weight: bounds the scratch of a tile. PIECE: tokens one thread prepares at a time.
enum { CHUNK = 512, PIECE = ADAPTER_ROWS };

struct Chunk {
    int64_t first, count;  // token rows
    int64_t pieces() const { return ceil_div(count, PIECE); }
};

FL_INLINE Chunk chunk_at(const Args& args, int64_t index) {
    return Chunk{index * CHUNK, min64(CHUNK, args.m - index * CHUNK)};
}
FL_INLINE int64_t chunks_of(const Args& args) { return ceil_div(args.m, CHUNK); }
FL_INLINE int64_t chunk_tokens(const Args& args) { return min64(args.m, CHUNK); }
FL_INLINE int64_t padded_rank(const Args& args) { return round_up(args.r, W); }

// Panels of a tile: fewer where there would be too few tiles to share out.
FL_INLINE int64_t panels_of(int64_t total, int64_t threads) {
    enum { MOST = 128 / PANEL };
    int64_t panels = min64(MOST, ceil_div(max64(total, 1), PANEL));
    while (panels > 1 && ceil_div(total, panels * PANEL) < 3 * threads) panels /= 2;
    return panels;
}

// Steps of one tile: `total` in equal parts of at most DEPTH, multiples of 32.
FL_INLINE int64_t depth_of(int64_t total) {
    return max64(32, min64(DEPTH, round_up(ceil_div(total, ceil_div(max64(total, 1), DEPTH)), 32)));
}

// Rows as the matrix kernels read them: 4-byte units, fp32 or (PAIR) two bf16. Either they lie there or a copy is made.
template <bool PAIR>
FL_INLINE bool readable(int64_t dtype, int64_t columns) {
    return PAIR ? columns % 2 == 0 : dtype == F32;
}
// Rows of so many floats share so few cache sets that ADAPTER_ROWS of them push each other out.
FL_INLINE bool crowded(int64_t columns) { return columns % 1024 == 0; }
// Row stride of a copy: not a power of two, so that rows do not share cache sets.
FL_INLINE int64_t padded_units(int64_t units) { return round_up(units, 16) + 16; }

// fp32 columns -> the same as one row of a copy; PAIR: an odd end is padded with 0.
template <bool PAIR>
static void put_row(const float* src, int64_t count, float* dst) {
    if (!PAIR) {
        memcpy(dst, src, (size_t)count * 4);
        return;
    }
    from_f32(src, count, dst, BF16, 0);
    if (count & 1) ((uint16_t*)dst)[count] = 0;
}

// Rows [rows][count] of stride ld -> panels [rows][PANEL] side by side, the last one padded with 0.
static void put_panels(const float* src, int64_t rows, int64_t count, int64_t ld, float* dst) {
    for (int64_t j = 0; j < count; j += PANEL) {
        const int64_t here = min64(PANEL, count - j);
        for (int64_t i = 0; i < rows; ++i, dst += PANEL) {
            memcpy(dst, src + i * ld + j, (size_t)here * 4);
            memset(dst + here, 0, (size_t)(PANEL - here) * 4);
        }
    }
}

// src [rows][columns] -> dst [columns][padded], the padding 0; columns first .. last - 1.
static void transpose_padded(const float* src, int64_t rows, int64_t columns, int64_t padded, int64_t first,
                             int64_t last, float* dst) {
    transpose(src + first, rows, last - first, columns, dst + first * padded, padded);
    for (int64_t j = first; j < last; ++j)
        for (int64_t i = rows; i < padded; ++i) dst[j * padded + i] = 0;
}

}  // namespace

#endif
