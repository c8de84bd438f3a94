// The one matrix kernel. Lanes run over a "panel" of up to 2 W columns (tokens, or features where a gradient reduces
// over tokens), rows over scalars that are broadcast from a decoded weight tile:
//     C[row][lane] += sum_d P[d][lane] * w[row, d]
// PAIR: P and w hold two bf16 a 32-bit unit and d counts units. Every call sums its own steps from zero and adds them to
// C once: a long reduction in blocks of DEPTH or so keeps its error near that of one block.
#ifndef FASTLORA_CPU_GEMM_H
#define FASTLORA_CPU_GEMM_H

namespace {

enum {
    PANEL = 2 * W,  // lanes of a full panel
    DEPTH = 256,    // columns packed at once
    // Features of a tile, multiples of every tier's ROWS_T1 and ROWS_T2: with few tokens the tile should stay in the L1
    // cache, with many the packed tokens should be read seldom.
    MANY = 128,
    FEATURES_FWD = 96,
    FEATURES_FWD_FEW = 24,
    FEATURES_BWD = 192,
    FEATURES_BWD_FEW = 96,
    UNITS_BWD_FEW = 64,
    LANES = 128,  // columns of one piece of a gradient that reduces over tokens
};

// Reduction units of one decoded tile, and the row stride of a forward one: not a power of two, so that rows do not
// share cache sets.
template <bool PAIR>
struct Tiled {
    enum { UNITS = PAIR ? 256 : 128, LD = UNITS + 16 };
};

// Row r of w starts at w + r * RS; the reduction steps by `step`.
template <int R, int T, int RS, bool PAIR>
static void micro(const float* p, int64_t ldp, const float* w, int64_t step, int64_t depth, float* c, int64_t ldc) {
    vf acc[R][T];
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) acc[i][j] = vzero();
    }
    for (int64_t d = 0; d < depth; ++d, p += ldp, w += step) {
        vf x[T];
        FL_UNROLL
        for (int j = 0; j < T; ++j) x[j] = vload(p + j * W);
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            const vf s = vset1(w[i * RS]);
            FL_UNROLL
            for (int j = 0; j < T; ++j) acc[i][j] = PAIR ? vdot(x[j], s, acc[i][j]) : vfma(x[j], s, acc[i][j]);
        }
    }
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int j = 0; j < T; ++j) vstore(c + i * ldc + j * W, vadd(vload(c + i * ldc + j * W), acc[i][j]));
    }
}

// All rows of a tile with one panel of `width` lanes (W or 2 W); `rows` is rounded up, so C and w are padded.
template <int RS, bool PAIR>
static void tile_times_panel(const float* p, int64_t width, const float* w, int64_t step, int64_t depth, float* c,
                             int64_t rows) {
    if (width == PANEL)
        for (int64_t i = 0; i < rows; i += ROWS_T2)
            micro<ROWS_T2, 2, RS, PAIR>(p, PANEL, w + i * RS, step, depth, c + i * PANEL, PANEL);
    else
        for (int64_t i = 0; i < rows; i += ROWS_T1)
            micro<ROWS_T1, 1, RS, PAIR>(p, W, w + i * RS, step, depth, c + i * W, W);
}

// The same for the r rows of an adapter (a multiple of ROWS_ADAPTER), fp32, w stored [depth][rows]. h and g are small sums
// of long rows that cancel: summing SHORT steps, then those sums, then the blocks keeps them as exact as a wide dot product.
static void adapter_times_panel(const float* p, int64_t ldp, int64_t width, const float* w, int64_t step, int64_t depth,
                                float* c, int64_t ldc, int64_t rows) {
    enum { SHORT = 32 };
    float block[ROWS_ADAPTER * PANEL];
    for (int64_t i = 0; i < rows; i += ROWS_ADAPTER) {
        memset(block, 0, sizeof(block));
        for (int64_t d = 0; d < depth; d += SHORT) {
            const int64_t steps = min64(SHORT, depth - d);
            const float *from = p + d * ldp, *row = w + d * step + i;
            if (width == PANEL) micro<ROWS_ADAPTER, 2, 1, false>(from, ldp, row, step, steps, block, PANEL);
            else micro<ROWS_ADAPTER, 1, 1, false>(from, ldp, row, step, steps, block, PANEL);
        }
        for (int64_t row = 0; row < ROWS_ADAPTER; ++row)
            for (int64_t lane = 0; lane < width; ++lane) c[(i + row) * ldc + lane] += block[row * PANEL + lane];
    }
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

// dst[i] = the mask's bit `from + i` ? src[i] : 0; `bits` is the row's first byte. src may be dst.
static void apply_mask(const float* src, const uint8_t* bits, int64_t from, int64_t count, float* dst) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t column = from + i;
        const uint32_t keep = 0u - ((bits[column >> 3] >> (column & 7)) & 1u);
        dst[i] = float_of(bits_of(src[i]) & keep);
    }
}

// dst[j * ldd + i] = src[i * ld + j], 4-byte units.
static void transpose(const float* src, int64_t rows, int64_t columns, int64_t ld, float* dst, int64_t ldd) {
    int64_t whole_rows = 0, whole_columns = 0;
#ifdef FL_AVX512
    whole_rows = rows & ~(int64_t)15, whole_columns = columns & ~(int64_t)15;
    for (int64_t j = 0; j < whole_columns; j += 16)
        for (int64_t i = 0; i < whole_rows; i += 16) transpose_block(src + i * ld + j, ld, dst + j * ldd + i, ldd);
#endif
    for (int64_t j = 0; j < columns; ++j)
        for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) dst[j * ldd + i] = src[i * ld + j];
}

// Rows [tokens][count] (row stride ld, 4-byte units) -> panel [count][width]; lanes beyond `tokens` are 0.
static void to_panel(const float* rows, int64_t ld, int64_t tokens, int64_t count, int64_t width, float* dst) {
    transpose(rows, tokens, count, ld, dst, width);
    if (tokens < width)
        for (int64_t d = 0; d < count; ++d)
            for (int64_t t = tokens; t < width; ++t) dst[d * width + t] = 0;
}

// C [rows][width] -> row-major [tokens][ld].
static void from_panel(const float* c, int64_t rows, int64_t width, int64_t tokens, float* dst, int64_t ld) {
    transpose(c, rows, tokens, width, dst, ld);
}

}  // namespace

#endif
