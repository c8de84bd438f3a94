// How the backward for a few tokens reads V vectors of a row of w (of a pair of rows): from a tile, from a dense
// weight, from packed codes without their scales.
#ifndef FASTLORA_CPU_FEW_ROWS_H
#define FASTLORA_CPU_FEW_ROWS_H

namespace {

// A tile [units][stride] of decoded (or dense fp32) weight.
struct TileRows {
    const float* tile;
    int64_t stride;
    template <int V>
    FL_MEMBER void load(int64_t unit, vf w[V]) const {
        FL_UNROLL
        for (int v = 0; v < V; ++v) w[v] = vload(tile + unit * stride + v * W);
    }
    void move(int64_t columns) { tile += columns; }
};

// A dense fp32 weight as it lies.
struct DenseRows {
    const float* dense;
    int64_t stride, ahead;  // from here to what is read next
    template <int V>
    FL_MEMBER void load(int64_t row, vf w[V]) const {
        const float* p = dense + row * stride;
        FL_UNROLL
        for (int v = 0; v < V; ++v) {
            if (v * W % 16 == 0) __builtin_prefetch(p + ahead + v * W, 0, 2);
            w[v] = vload(p + v * W);
        }
    }
    void move(int64_t columns) { dense += columns; }
};

#ifdef FL_LOOKUP
// Codes of 2 W columns a pair of vectors: even columns, odd columns.
struct PackedRows {
    const uint8_t* packed;
    int64_t bytes, ahead;  // of a row; from here to what is read next
    Lookup codes;
    PackedRows(const uint8_t* p, int64_t row_bytes, int64_t, int64_t next, const float* code)
        : packed(p), bytes(row_bytes), ahead(next), codes(code) {}
    template <int V>
    FL_MEMBER void load(int64_t row, vf w[V]) const {
        const uint8_t* p = packed + row * bytes;
        __builtin_prefetch(p + ahead, 0, 2);
        FL_UNROLL
        for (int v = 0; v < V; v += 2) codes.pair(p + v * W / 2, w + v);
    }
    void move(int64_t columns) { packed += columns / 2; }
};
template <bool PAIR>
struct PackedOf {
    typedef PackedRows Rows;
};
#endif

#ifdef FL_BF16
// The same for pairs of rows: lanes hold the codes of both in bf16. An odd last row is paired with itself (and with 0
// of dy). The permute reads index bits 0-4: with the table twice over, bit 4 does not matter.
struct PackedPairs {
    const uint8_t* packed;
    int64_t bytes, rows, ahead;
    __m512i table;
    PackedPairs(const uint8_t* p, int64_t row_bytes, int64_t count, int64_t next, const float* code)
        : packed(p), bytes(row_bytes), rows(count), ahead(next) {
        const __m512i low = round_bf16(_mm512_loadu_ps(code));
        const __m256i half = _mm512_cvtepi32_epi16(low);
        table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    }
    template <int V>
    FL_MEMBER void load(int64_t unit, vf w[V]) const {
        const uint8_t* p = packed + 2 * unit * bytes;
        const uint8_t* q = p + (2 * unit + 1 < rows ? bytes : 0);
        __builtin_prefetch(p + ahead, 0, 2);
        __builtin_prefetch(q + ahead, 0, 2);
        FL_UNROLL
        for (int v = 0; v < V; v += 2) {
            const __m512i high = _mm512_slli_epi32(bytes_of(q + v * 8), 16);
            const __m512i nibbles = _mm512_or_si512(bytes_of(p + v * 8), high);
            w[v] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi32(nibbles, 4), table));
            w[v + 1] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(nibbles, table));
        }
    }
    void move(int64_t columns) { packed += columns / 2; }
};
// Pairs of rows of a dense bf16 weight.
struct DensePairs {
    const uint16_t* dense;
    int64_t stride, rows, ahead;
    template <int V>
    FL_MEMBER void load(int64_t unit, vf w[V]) const {
        const uint16_t* p = dense + 2 * unit * stride;
        const uint16_t* q = p + (2 * unit + 1 < rows ? stride : 0);
        FL_UNROLL
        for (int v = 0; v < V; ++v) {
            if (v % 2 == 0) __builtin_prefetch(p + ahead + v * W, 0, 2), __builtin_prefetch(q + ahead + v * W, 0, 2);
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p + v * W)));
            w[v] = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(vload_bf16(q + v * W))));
        }
    }
    void move(int64_t columns) { dense += columns; }
};
template <>
struct PackedOf<true> {
    typedef PackedPairs Rows;
};
#endif

}  // namespace

#endif
