// How a call is cut into pieces: panels of tokens, chunks of panels, scratch. Which thread takes a piece never changes
// the arithmetic, so results are bitwise equal for every number of threads.
#ifndef FASTLORA_CPU_TEAM_H
#define FASTLORA_CPU_TEAM_H

namespace {

// Cuts one allocation into 64-byte aligned arrays; with a null base it only adds up the size.
struct Arena {
    float* base;
    int64_t used;
    explicit Arena(float* b) : base(b), used(0) {}
    float* take(int64_t floats) {
        float* p = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return p;
    }
};

// Tokens that are packed at once: bounds the packed copy, and the accumulators of one tile stay in the L2 cache.
enum { CHUNK = 512 };

struct Chunk {
    int64_t first, count;  // token rows
    int64_t panels() const { return ceil_div(count, PANEL); }
    int64_t tokens(int64_t panel) const { return min64(PANEL, count - panel * PANEL); }
    int64_t width(int64_t panel) const { return tokens(panel) > W ? (int64_t)PANEL : (int64_t)W; }
};

FL_INLINE Chunk chunk_at(const Args& args, int64_t index) {
    return Chunk{index * CHUNK, min64(CHUNK, args.m - index * CHUNK)};
}
FL_INLINE int64_t chunks_of(const Args& args) { return ceil_div(args.m, CHUNK); }
FL_INLINE int64_t chunk_lanes(const Args& args) { return round_up(min64(args.m, CHUNK), PANEL); }
FL_INLINE int64_t padded_rank(const Args& args) { return round_up(args.r, ROWS_ADAPTER); }

// Fewer features a tile where there would be too few tiles to share out.
FL_INLINE int64_t features_of(int64_t total, int64_t most, int64_t threads) {
    int64_t features = most;
    while (features > ROWS_T1 && features % (2 * ROWS_T1) == 0 && ceil_div(total, features) < 3 * threads)
        features /= 2;
    return features;
}

// fp32 rows [tokens][DEPTH] of `count` columns -> packed panel; PAIR: as bf16 pairs along the columns.
template <bool PAIR>
static void put_panel(const float* rows, int64_t tokens, int64_t count, int64_t width, float* units, float* dst) {
    if (!PAIR) return to_panel(rows, DEPTH, tokens, count, width, dst);
    for (int64_t t = 0; t < tokens; ++t) {
        uint16_t* row = (uint16_t*)(units + t * (DEPTH / 2));
        from_f32(rows + t * DEPTH, count, row, BF16, 0);
        if (count & 1) row[count] = 0;
    }
    to_panel(units, DEPTH / 2, tokens, ceil_div(count, 2), width, dst);
}

// src [rows][columns] -> dst [columns][padded], the padding 0; columns first .. last - 1.
static void transpose_padded(const float* src, int64_t rows, int64_t columns, int64_t padded, int64_t first,
                             int64_t last, float* dst) {
    for (int64_t j = first; j < last; ++j)
        for (int64_t i = 0; i < padded; ++i) dst[j * padded + i] = i < rows ? src[i * columns + j] : 0;
}

}  // namespace

#endif
