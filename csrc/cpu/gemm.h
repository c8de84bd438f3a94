// The matrix kernels. Lanes run over a panel of up to PANEL columns of a decoded weight tile; rows are tokens, read
// where they lie and broadcast, so neither the activations nor the result are transposed or packed:
//     C[token][lane] (+)= sum_d x[token][d] * P[d][lane]
// PAIR: x and P hold two bf16 a 32-bit unit and d counts units. Every call sums its own steps from zero and adds them
// to C once: a long reduction in blocks of DEPTH keeps its error near that of one block.
#ifndef FASTLORA_CPU_GEMM_H
#define FASTLORA_CPU_GEMM_H

namespace {

enum {
    PANEL = TILE_VECTORS * W,  // lanes of a full panel
    DEPTH = 256,               // reduction steps (PAIR: units) of one decoded tile
    LANES = 8 * W,             // columns of one piece of a gradient that reduces over tokens
    SHORT = 32,                // steps of an adapter's innermost sum
};

// R rows and T vectors of lanes; element (i, d) of x is x[i * ldx + d]. C is overwritten unless `add`.
template <int R, int T, bool PAIR>
static void micro(const float* p, const float* x, int64_t ldx, int64_t depth, float* c, int64_t ldc, bool add) {
    vf acc[R][T];
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) acc[i][j] = vzero();
    }
    for (const float* end = x + depth; x != end; ++x, p += PANEL) {
        vf w[T];
        FL_UNROLL
        for (int j = 0; j < T; ++j) w[j] = vload(p + j * W);
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            const vf s = vset1(x[i * ldx]);
            FL_UNROLL
            for (int j = 0; j < T; ++j) acc[i][j] = PAIR ? vdot(w[j], s, acc[i][j]) : vfma(w[j], s, acc[i][j]);
        }
    }
    if (add) {
        float* from = c;
        FL_UNROLL
        for (int i = 0; i < R; ++i, from += ldc) {
            FL_UNROLL
            for (int j = 0; j < T; ++j) acc[i][j] = vadd(vload(from + j * W), acc[i][j]);
        }
    }
    FL_UNROLL
    for (int i = 0; i < R; ++i, c += ldc) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) vstore(c + j * W, acc[i][j]);
    }
}

template <int R, bool PAIR>
FL_INLINE void micro_wide(int64_t vectors, const float* p, const float* x, int64_t ldx, int64_t depth, float* c,
                          int64_t ldc, bool add) {
    switch (vectors) {
        case 1:
            return micro<R, 1, PAIR>(p, x, ldx, depth, c, ldc, add);
        case 2:
            if constexpr (TILE_VECTORS > 2) return micro<R, 2, PAIR>(p, x, ldx, depth, c, ldc, add);
        case 3:
            if constexpr (TILE_VECTORS > 3) return micro<R, 3, PAIR>(p, x, ldx, depth, c, ldc, add);
        default:
            return micro<R, TILE_VECTORS, PAIR>(p, x, ldx, depth, c, ldc, add);
    }
}

// `rows` rows of x, at most TILE_ROWS, with one panel of `vectors` vectors.
template <bool PAIR>
static void rows_times_panel(int64_t rows, int64_t vectors, const float* p, const float* x, int64_t ldx, int64_t depth,
                             float* c, int64_t ldc, bool add) {
    switch (rows) {
        case 1:
            return micro_wide<1, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
        case 2:
            return micro_wide<2, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
        case 3:
            return micro_wide<3, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
        case 4:
            if constexpr (TILE_ROWS > 4) return micro_wide<4, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
        case 5:
            if constexpr (TILE_ROWS > 5) return micro_wide<5, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
        default:
            return micro_wide<TILE_ROWS, PAIR>(vectors, p, x, ldx, depth, c, ldc, add);
    }
}

FL_INLINE int64_t vectors_of(int64_t lanes) { return ceil_div(min64(lanes, PANEL), W); }

// A tile of `lanes` columns: panel j of [depth][PANEL] starts at p + j * step.
template <bool PAIR>
static void rows_times_tile(int64_t rows, int64_t lanes, const float* p, int64_t step, const float* x, int64_t ldx,
                            int64_t depth, float* c, int64_t ldc, bool add) {
    for (int64_t t = 0; t < rows; t += TILE_ROWS)
        for (int64_t j = 0; j < lanes; j += PANEL)
            rows_times_panel<PAIR>(min64(TILE_ROWS, rows - t), vectors_of(lanes - j), p + j / PANEL * step, x + t * ldx,
                                   ldx, depth, c + t * ldc + j, ldc, add);
}

// --- sums of an adapter ----------------------------------------------------------------------------------------------

// C[i][lane] += sum_d P[d][lane] * x[i * row + d * step], fp32. h and g are small sums of long rows that cancel:
// summing SHORT steps, then those sums, then the calls (of DEPTH steps) keeps them as exact as a wide dot product.
template <int R, int T>
static void short_sums(const float* p, int64_t ldp, const float* x, int64_t row, int64_t step, int64_t depth, float* c,
                       int64_t ldc) {
    vf total[R][T];
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) total[i][j] = vzero();
    }
    for (int64_t d = 0; d < depth; d += SHORT) {
        vf acc[R][T];
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            FL_UNROLL
            for (int j = 0; j < T; ++j) acc[i][j] = vzero();
        }
        for (int64_t end = min64(SHORT, depth - d); end > 0; --end, p += ldp, x += step) {
            vf w[T];
            FL_UNROLL
            for (int j = 0; j < T; ++j) w[j] = vload(p + j * W);
            FL_UNROLL
            for (int i = 0; i < R; ++i) {
                const vf s = vset1(x[i * row]);
                FL_UNROLL
                for (int j = 0; j < T; ++j) acc[i][j] = vfma(w[j], s, acc[i][j]);
            }
        }
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            FL_UNROLL
            for (int j = 0; j < T; ++j) total[i][j] = vadd(total[i][j], acc[i][j]);
        }
    }
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) vstore(c + i * ldc + j * W, vadd(vload(c + i * ldc + j * W), total[i][j]));
    }
}

template <int R, int T>
static int64_t short_sums_while(int64_t t, int64_t rows, const float* p, int64_t ldp, const float* x, int64_t ldx,
                                int64_t depth, float* c, int64_t ldc) {
    for (; t + R <= rows; t += R) short_sums<R, T>(p, ldp, x + t * ldx, ldx, 1, depth, c + t * ldc, ldc);
    return t;
}

// C[rows][lanes] += x[rows][depth] P[depth][lanes] for the few lanes of a rank (a multiple of W).
static void rows_times_rank(int64_t rows, int64_t lanes, const float* p, int64_t ldp, const float* x, int64_t ldx,
                            int64_t depth, float* c, int64_t ldc) {
    enum { R = ADAPTER_ROWS };
    int64_t j = 0;
    for (; j + 2 * W <= lanes; j += 2 * W) {
        int64_t t = short_sums_while<R / 2, 2>(0, rows, p + j, ldp, x, ldx, depth, c + j, ldc);
        short_sums_while<1, 2>(t, rows, p + j, ldp, x, ldx, depth, c + j, ldc);
    }
    if (j == lanes) return;
    int64_t t = short_sums_while<R, 1>(0, rows, p + j, ldp, x, ldx, depth, c + j, ldc);
    t = short_sums_while<R / 3, 1>(t, rows, p + j, ldp, x, ldx, depth, c + j, ldc);
    short_sums_while<1, 1>(t, rows, p + j, ldp, x, ldx, depth, c + j, ldc);
}

// C[rank][LANES] += sum over tokens of x[token][rank] (row stride ldx) times P, which lies in groups of W lanes:
// [LANES / W][DEPTH][W].
static void rank_times_lanes(int64_t rank, int64_t lanes, const float* p, const float* x, int64_t ldx, int64_t tokens,
                             float* c) {
    for (int64_t j = 0; j < lanes; j += W)
        for (int64_t i = 0; i < rank; i += RANK_ROWS)
            short_sums<RANK_ROWS, 1>(p + j * DEPTH, W, x + i, 1, ldx, tokens, c + i * LANES + j, LANES);
}

// --- conversions of row segments -------------------------------------------------------------------------------------

static void to_f32(const void* src, int64_t dtype, int64_t from, int64_t count, float* dst) {
    int64_t i = 0;
    if (dtype == F32) {
        memcpy(dst, (const float*)src + from, (size_t)count * 4);
        return;
    }
    const uint16_t* p = (const uint16_t*)src + from;
    if (dtype == BF16)
        for (; i + W <= count; i += W) vstore(dst + i, vload_bf16(p + i));
    else
        for (; i + W <= count; i += W) vstore(dst + i, vload_f16(p + i));
    for (; i < count; ++i) dst[i] = to_f32_one(p, dtype, i);
}

static void from_f32(const float* src, int64_t count, void* dst, int64_t dtype, int64_t from) {
    int64_t i = 0;
    if (dtype == F32) {
        memcpy((float*)dst + from, src, (size_t)count * 4);
        return;
    }
    uint16_t* p = (uint16_t*)dst + from;
    if (dtype == BF16)
        for (; i + W <= count; i += W) vstore_bf16(p + i, vload(src + i));
    else
        for (; i + W <= count; i += W) vstore_f16(p + i, vload(src + i));
    for (; i < count; ++i) from_f32_one(src[i], p, dtype, i);
}

// dst[i] = the mask's bit `from + i` ? src[i] : 0; `bits` is the row's first byte, `from` a multiple of 8; src may be
// dst.
static void apply_mask(const float* src, const uint8_t* bits, int64_t from, int64_t count, float* dst) {
    int64_t i = 0;
    bits += from >> 3;
    for (; i + W <= count; i += W) vstore(dst + i, vkeep(vload(src + i), bits_at(bits, i)));
    for (; i < count; ++i) dst[i] = float_of(bits_of(src[i]) & (0u - ((bits[i >> 3] >> (i & 7)) & 1u)));
}

// dst[j * ldd + i] = src[i * ld + j], 4-byte units.
static void transpose(const float* src, int64_t rows, int64_t columns, int64_t ld, float* dst, int64_t ldd) {
    int64_t whole_rows = 0, whole_columns = 0;
#ifdef FL_TURN
    whole_rows = rows / FL_TURN * FL_TURN, whole_columns = columns / FL_TURN * FL_TURN;
    for (int64_t j = 0; j < whole_columns; j += FL_TURN)
        for (int64_t i = 0; i < whole_rows; i += FL_TURN) {
            for (int64_t row = i; row < i + FL_TURN && j % 16 == 0; ++row) __builtin_prefetch(src + row * ld + j + 32);
            transpose_block(src + i * ld + j, ld, dst + j * ldd + i, ldd);
        }
#endif
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) dst[j * ldd + i] = src[i * ld + j];
}

}  // namespace

#endif
