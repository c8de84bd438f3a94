// AVX-512 (F, BW, VL, DQ; with FL_BF16 also AVX512_BF16): sixteen fp32 lanes.
#ifndef FASTLORA_CPU_VEC_AVX512_H
#define FASTLORA_CPU_VEC_AVX512_H

#include <immintrin.h>

#include "common.h"

namespace {

typedef __m512 vf;
#define FL_AVX512
#define FL_LOOKUP   // it has `Lookup`: codes are decoded in registers
#define FL_TURN 16  // it has `transpose_block` of so many rows and columns
#define FL_RANK_BLOCK  // it has `rank_block`
enum { W = 16, TILE_ROWS = 6, TILE_VECTORS = 4, ADAPTER_ROWS = 12, RANK_ROWS = 8 };
#ifdef FL_BF16
enum { HAS_PAIR = 1 };
#else
enum { HAS_PAIR = 0 };
#endif

FL_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
FL_INLINE void vstore(float* p, vf v) { _mm512_storeu_ps(p, v); }
FL_INLINE vf vset1(float v) { return _mm512_set1_ps(v); }
FL_INLINE vf vzero() { return _mm512_setzero_ps(); }
FL_INLINE vf vadd(vf a, vf b) { return _mm512_add_ps(a, b); }
FL_INLINE vf vmul(vf a, vf b) { return _mm512_mul_ps(a, b); }
FL_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FL_INLINE float vsum(vf v) { return _mm512_reduce_add_ps(v); }

// The mask bits of lanes i .. i + W - 1, and v with 0 where its bit is 0.
FL_INLINE uint32_t bits_at(const uint8_t* bits, int64_t i) {
    uint16_t v;
    memcpy(&v, bits + (i >> 3), 2);
    return v;
}
FL_INLINE vf vkeep(vf v, uint32_t bits) { return _mm512_maskz_mov_ps((__mmask16)bits, v); }

// c + a[2i] * b[2i] + a[2i+1] * b[2i+1]; lanes hold two bf16.
FL_INLINE vf vdot(vf a, vf b, vf c) {
#ifdef FL_BF16
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
    (void)a, (void)b;
    return c;
#endif
}

// 2 W numbers as bf16, to nearest even; denormals become 0, as the dot products read them.
FL_INLINE vf vpairs(vf low, vf high) {
#ifdef FL_BF16
    return (vf)_mm512_cvtne2ps_pbh(high, low);
#else
    (void)high;
    return low;
#endif
}

FL_INLINE vf vload_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
FL_INLINE vf vload_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// fp32 -> bf16 in the low half of each lane, to nearest even, NaN made quiet.
FL_INLINE __m512i round_bf16(vf v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
}
FL_INLINE __m256i round_f16(vf v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Where the CPU converts, a denormal becomes 0, as in its dot products.
FL_INLINE void vstore_bf16(uint16_t* p, vf v) {
#ifdef FL_BF16
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(round_bf16(v)));
#endif
}
FL_INLINE void vstore_f16(uint16_t* p, vf v) { _mm256_storeu_si256((__m256i*)p, round_f16(v)); }

// dst[j * ldd + i] = rows[i][j] for 16 x 16 elements of 4 bytes.
FL_INLINE void transpose_16(const vf* rows, float* dst, int64_t ldd) {
    __m512d pairs[16];
    FL_UNROLL
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1]));
        pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1]));
    }
    vf fours[16];  // [4 q + c]: rows 4 q .. 4 q + 3 of columns c, c + 4, c + 8, c + 12, one a 128-bit lane
    FL_UNROLL
    for (int q = 0; q < 16; q += 4) {
        FL_UNROLL
        for (int c = 0; c < 2; ++c) {
            fours[q + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[q + c], pairs[q + 2 + c]));
            fours[q + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[q + c], pairs[q + 2 + c]));
        }
    }
    FL_UNROLL
    for (int c = 0; c < 4; ++c) {
        const vf low0 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x88);
        const vf odd0 = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xdd);
        const vf low1 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x88);
        const vf odd1 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xdd);
        _mm512_storeu_ps(dst + c * ldd, _mm512_shuffle_f32x4(low0, low1, 0x88));
        _mm512_storeu_ps(dst + (c + 4) * ldd, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
        _mm512_storeu_ps(dst + (c + 8) * ldd, _mm512_shuffle_f32x4(low0, low1, 0xdd));
        _mm512_storeu_ps(dst + (c + 12) * ldd, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
    }
}

// The same from memory, rows of stride ld.
FL_INLINE void transpose_block(const float* src, int64_t ld, float* dst, int64_t ldd) {
    vf rows[16];
    FL_UNROLL
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_ps(src + i * ld);
    transpose_16(rows, dst, ldd);
}

// c + the sum over j < 16, one after another, of h[j] times column j of 16 rows of stride ld; a lane a row.
FL_INLINE vf rank_block(const float* rows, int64_t ld, const float* h, vf c) {
    float turned[256];
    transpose_block(rows, ld, turned, 16);
    FL_UNROLL
    for (int j = 0; j < 16; ++j) c = vfma(vload(turned + 16 * j), vset1(h[j]), c);
    return c;
}

// The same for bf16. Two numbers are one word, and rows i and i + 8 share a vector: half the shuffles.
FL_INLINE vf rank_block(const uint16_t* rows, int64_t ld, const float* h, vf c) {
    vf a[8], b[8];
    FL_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m256i low = _mm256_loadu_si256((const __m256i*)(rows + i * ld));
        const __m256i high = _mm256_loadu_si256((const __m256i*)(rows + (i + 8) * ld));
        a[i] = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    FL_UNROLL
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    FL_UNROLL
    for (int i = 0; i < 8; i += 4) {  // a[i + j]: words j and j + 4 of rows i .. i + 3 and i + 8 .. i + 11
        FL_UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m512d first = _mm512_castps_pd(b[i + j]), second = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(first, second));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(first, second));
        }
    }
    // Quarters of a lane order 0, 2, 1, 3, which the sum keeps until its end.
    c = _mm512_shuffle_f32x4(c, c, 0xd8);
    FL_UNROLL
    for (int word = 0; word < 8; ++word) {
        const vf w = word < 4 ? _mm512_shuffle_f32x4(a[word & 3], a[(word & 3) + 4], 0x88)
                              : _mm512_shuffle_f32x4(a[word & 3], a[(word & 3) + 4], 0xdd);
        const __m512i both = _mm512_castps_si512(w);
        c = vfma(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), vset1(h[2 * word]), c);
        c = vfma(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536))), vset1(h[2 * word + 1]), c);
    }
    return _mm512_shuffle_f32x4(c, c, 0xd8);
}

// The 4-byte words chosen by `some` of 16 rows `stride` bytes apart, dst[16 * word + row]; the last of `rows` repeats.
FL_INLINE void turn_words(const uint8_t* src, int64_t stride, int64_t rows, __mmask16 some, float* dst) {
    vf words[16];
    FL_UNROLL
    for (int i = 0; i < 16; ++i)
        words[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(some, src + (i < rows ? i : rows - 1) * stride));
    transpose_16(words, dst, 16);
}

// Streaming stores are weakly ordered: other threads may read the output only after this.
FL_INLINE void stream_fence() { _mm_sfence(); }

// --- decode ----------------------------------------------------------------------------------------------------------

struct Codes {
    const float* code;
    vf table;
    explicit Codes(const float* c) : code(c), table(_mm512_loadu_ps(c)) {}
};

// The permutes read index bits 0-3 only, so nibbles need no masking.
FL_INLINE __m512i bytes_of(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

template <bool STREAM>
FL_INLINE void put(void* dst, __m512i v) {
    if (STREAM) _mm512_stream_si512((__m512i*)dst, v);
    else _mm512_storeu_si512(dst, v);
}

// Decodes W bytes into their even and their odd columns.
struct Lookup {
    vf table;
    explicit Lookup(const float* code) : table(_mm512_loadu_ps(code)) {}
    FL_MEMBER Lookup() {}
    FL_MEMBER Lookup scaled(float scale) const {
        Lookup other;
        other.table = vmul(table, vset1(scale));
        return other;
    }
    FL_MEMBER void pair(const uint8_t* p, vf w[2]) const {
        const __m512i nibbles = bytes_of(p);
        w[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(nibbles, 4), table);
        w[1] = _mm512_permutexvar_ps(nibbles, table);
    }
};

// 2 W numbers <-> their even and their odd ones.
FL_INLINE void vsplit(const float* src, vf out[2]) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const vf a = vload(src), b = vload(src + W);
    out[0] = _mm512_permutex2var_ps(a, even, b);
    out[1] = _mm512_permutex2var_ps(a, odd, b);
}
FL_INLINE void vunsplit(float* inout) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const vf even = vload(inout), odd = vload(inout + W);
    vstore(inout, _mm512_permutex2var_ps(even, first, odd));
    vstore(inout + W, _mm512_permutex2var_ps(even, second, odd));
}

// `count` elements of one block from flat position `flat`. STREAM: dst is 64-byte aligned and count a multiple of 32.
template <bool STREAM>
FL_INLINE void span_f32(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                        float* dst) {
    const vf table = _mm512_mul_ps(codes.table, _mm512_set1_ps(absmax));
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const uint8_t* p = packed + (flat >> 1);
    if (!STREAM && (flat & 1)) {
        if (count < 1) return;
        *dst++ = codes.code[*p++ & 15] * absmax;
        --count;
    }
    for (; count >= 32; count -= 32, p += 16, dst += 32) {
        const __m512i v = bytes_of(p);
        const vf low = _mm512_permutexvar_ps(v, table), high = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table);
        put<STREAM>(dst, _mm512_castps_si512(_mm512_permutex2var_ps(high, first, low)));
        put<STREAM>(dst + 16, _mm512_castps_si512(_mm512_permutex2var_ps(high, second, low)));
    }
    if (count > 0) {
        const __mmask16 some = (__mmask16)((1u << ((count + 1) >> 1)) - 1);
        const __m512i v = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, p));
        const vf low = _mm512_permutexvar_ps(v, table), high = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table);
        const uint32_t keep = (1u << count) - 1;
        _mm512_mask_storeu_ps(dst, (__mmask16)keep, _mm512_permutex2var_ps(high, first, low));
        _mm512_mask_storeu_ps(dst + 16, (__mmask16)(keep >> 16), _mm512_permutex2var_ps(high, second, low));
    }
}

// Each table entry rounded to a 16-bit type, in the low half of its lane.
FL_INLINE __m512i table_16(const Codes& codes, float absmax, int64_t dtype) {
    const vf table = _mm512_mul_ps(codes.table, _mm512_set1_ps(absmax));
    return dtype == BF16 ? round_bf16(table) : _mm512_cvtepu16_epi32(round_f16(table));
}

// A scaled table as bf16 in the low halves. Where the CPU has the conversion it is one instruction; it reads denormals
// as 0, which the dot products would do anyway.
FL_INLINE __m512i pair_table(vf table) {
#ifdef FL_BF16
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(table));
#else
    return round_bf16(table);
#endif
}

// Lanes (even, odd) rounded to two bf16, as `pair_table` rounds.
FL_INLINE __m512i as_pairs(vf even, vf odd) {
#ifdef FL_BF16
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i other = _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16);
    const __m512i order = _mm512_or_si512(lane, other);
    return _mm512_permutexvar_epi16(order, both);
#else
    return _mm512_or_si512(round_bf16(even), _mm512_slli_epi32(round_bf16(odd), 16));
#endif
}

// Even elements land in the low halves, odd ones in the high halves: natural order without a shuffle.
FL_INLINE __m512i pairs_of(__m512i v, __m512i low_half, __m512i high_half) {
    return _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(v, 4), low_half),
                           _mm512_permutexvar_epi32(v, high_half));
}

// FOR_DOT: as `pair_table`.
template <bool STREAM, bool FOR_DOT = false>
FL_INLINE void span_16(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                       int64_t dtype, uint16_t* dst) {
    const __m512i table =
        FOR_DOT ? pair_table(_mm512_mul_ps(codes.table, _mm512_set1_ps(absmax))) : table_16(codes, absmax, dtype);
    const __m512i high_half = _mm512_slli_epi32(table, 16);
    const uint8_t* p = packed + (flat >> 1);
    if (!STREAM && (flat & 1)) {
        if (count < 1) return;
        from_f32_one(codes.code[*p++ & 15] * absmax, dst++, dtype, 0);
        --count;
    }
    for (; count >= 32; count -= 32, p += 16, dst += 32) put<STREAM>(dst, pairs_of(bytes_of(p), table, high_half));
    if (count > 0) {
        const __mmask16 some = (__mmask16)((1u << ((count + 1) >> 1)) - 1);
        const __m512i v = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, p));
        _mm512_mask_storeu_epi16(dst, (__mmask32)((1u << count) - 1), pairs_of(v, table, high_half));
    }
}

// Elements of one block of two rows, `count` a multiple of 32, as lanes (row 0, row 1) of two bf16.
FL_INLINE void span_two_rows(const Codes& codes, float absmax0, float absmax1, const uint8_t* p0, const uint8_t* p1,
                             int64_t count, uint32_t* dst) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i low = pair_table(_mm512_mul_ps(codes.table, _mm512_set1_ps(absmax0)));
    const __m512i high = _mm512_slli_epi32(pair_table(_mm512_mul_ps(codes.table, _mm512_set1_ps(absmax1))), 16);
    for (int64_t i = 0; i < count; i += 32, p0 += 16, p1 += 16, dst += 32) {
        const __m512i v0 = bytes_of(p0), v1 = bytes_of(p1);
        const __m512i odd = _mm512_or_si512(_mm512_permutexvar_epi32(v0, low), _mm512_permutexvar_epi32(v1, high));
        const __m512i even = _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(v0, 4), low),
                                             _mm512_permutexvar_epi32(_mm512_srli_epi32(v1, 4), high));
        _mm512_storeu_si512(dst, _mm512_permutex2var_epi32(even, first, odd));
        _mm512_storeu_si512(dst + 16, _mm512_permutex2var_epi32(even, second, odd));
    }
}

// Columns [from, to) (multiples of 8) of `rows` <= 16 rows of w as lanes: dst[(column - from) * ld + row], or PAIR:
// bf16 pairs of columns. Rows have k columns in whole blocks of 1 << shift. Four bytes of each row are turned at a
// time; the eight nibbles then come out by shifts, and the products are those of a scaled table. Rows beyond `rows`
// repeat the last.
template <bool PAIR>
FL_INLINE void decode_transposed(const Codes& codes, const float* scales, int shift, const uint8_t* packed, int64_t k,
                                 int64_t row, int64_t rows, int64_t from, int64_t to, float* dst, int64_t ld) {
    alignas(64) float turned[16 * 16];
    alignas(64) float scale_of[16];
    const int64_t row_blocks = k >> shift, bytes = k >> 1;
    for (int64_t column = from; column < to; column += 128) {
        const int64_t words = (to - column >= 128 ? 128 : to - column) >> 3;
        const uint8_t* src = packed + row * bytes + (column >> 1);
        turn_words(src, bytes, rows, (__mmask16)((1u << words) - 1), turned);
        for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(src + i * bytes + 128);
        int64_t known = -1;
        vf absmax = vzero();
        for (int64_t word = 0; word < words; ++word) {
            const int64_t block = (column + 8 * word) >> shift;
            if (block != known) {
                const float* scale = scales + row * row_blocks + block;
                for (int64_t i = 0; i < 16; ++i, scale += i < rows ? row_blocks : 0) scale_of[i] = *scale;
                absmax = _mm512_load_ps(scale_of);
                known = block;
            }
            const __m512i v = _mm512_castps_si512(_mm512_load_ps(turned + 16 * word));
            FL_UNROLL
            for (int byte = 0; byte < 4; ++byte) {
                const vf even = _mm512_mul_ps(
                    _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * byte + 4), codes.table), absmax);
                const vf odd =
                    _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * byte), codes.table), absmax);
                if (PAIR) {
                    _mm512_storeu_si512(dst + byte * ld, as_pairs(even, odd));
                } else {
                    _mm512_storeu_ps(dst + 2 * byte * ld, even);
                    _mm512_storeu_ps(dst + (2 * byte + 1) * ld, odd);
                }
            }
            dst += PAIR ? 4 * ld : 8 * ld;
        }
    }
}

// Nested scales to fp32: map[code] * nested + offset, two roundings. The map is looked up in registers, 32 entries at a
// time: gathers are slower than that, several times so on AMD.
FL_INLINE void expand_scales(const uint8_t* codes, float nested, float offset, int64_t count, float* dst) {
    vf map[16];
    FL_UNROLL
    for (int i = 0; i < 16; ++i) map[i] = _mm512_loadu_ps(fl_dynamic_map + 16 * i);
    const vf scale = _mm512_set1_ps(nested), shift = _mm512_set1_ps(offset);
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 some = (__mmask16)(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
        const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes + i));
        const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
        const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
        const __mmask16 bit7 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
        vf part[4];
        FL_UNROLL
        for (int j = 0; j < 4; ++j)
            part[j] = _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(map[4 * j], index, map[4 * j + 1]),
                                           _mm512_permutex2var_ps(map[4 * j + 2], index, map[4 * j + 3]));
        const vf low = _mm512_mask_blend_ps(bit6, part[0], part[1]),
                 high = _mm512_mask_blend_ps(bit6, part[2], part[3]);
        const vf value = _mm512_mask_blend_ps(bit7, low, high);
        _mm512_mask_storeu_ps(dst + i, some, _mm512_add_ps(_mm512_mul_ps(value, scale), shift));
    }
}

// dst[i] = (low[i], high[i]) as one lane of two bf16, for whole vectors of 32.
FL_INLINE void interleave_16(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* dst) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + i)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + i)));
        _mm512_storeu_si512(dst + i, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
    for (; i < count; ++i) dst[i] = low[i] | ((uint32_t)high[i] << 16);
}

// --- encode ----------------------------------------------------------------------------------------------------------

struct Search {
    vf points;
    __m512i order;
    bool fp4;
    // NF4: [-1, 1] in bins so narrow that each holds at most one decision point, and the codes below the bins
    vf point_of[2];
    __m512i below[2];
    explicit Search(bool is_fp4) : fp4(is_fp4) {
        points = _mm512_maskz_loadu_ps(is_fp4 ? 0x7f : 0x7fff, is_fp4 ? fl_fp4_mid : fl_nf4_mid);
        order = _mm512_setr_epi32(0, 1, 6, 7, 4, 5, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0);
        float point[32];
        int32_t count[32] = {};
        for (int bin = 0; bin < 32; ++bin) point[bin] = 2;
        for (int i = 0; i < 15 && !is_fp4; ++i) {
            const int bin = (int)(fl_nf4_mid[i] * BINS + 16);
            point[bin] = fl_nf4_mid[i];
            for (int later = bin + 1; later < 32; ++later) ++count[later];
        }
        for (int i = 0; i < 2; ++i) {
            point_of[i] = _mm512_loadu_ps(point + 16 * i);
            below[i] = _mm512_loadu_si512(count + 16 * i);
        }
    }
    // Bins in a unit: below 16, so that rounding cannot carry 1 out of the last bin.
    static constexpr float BINS = 15.9f;
};

// The code of NF4 numbers that rounding may have carried a little beyond [-1, 1]; no NaN, no infinity.
FL_INLINE __m512i search_tame(const Search& s, vf v) {
    const __m512i bin = _mm512_cvttps_epi32(_mm512_fmadd_ps(v, _mm512_set1_ps(Search::BINS), _mm512_set1_ps(16)));
    const vf point = _mm512_permutex2var_ps(s.point_of[0], bin, s.point_of[1]);
    const __mmask16 above = _mm512_cmp_ps_mask(v, point, _CMP_GT_OQ);
    const __m512i code = _mm512_permutex2var_epi32(s.below[0], bin, s.below[1]);
    return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}

// Branch-free binary search over the decision points; "not <=" sends NaN to the highest code.
FL_INLINE __m512i search(const Search& s, vf v) {
    __m512i index = _mm512_setzero_si512();
    const vf key = s.fp4 ? _mm512_abs_ps(v) : v;
    FL_UNROLL
    for (int step = 8; step; step >>= 1) {
        if (step == 8 && s.fp4) continue;
        const __m512i probe = _mm512_add_epi32(index, _mm512_set1_epi32(step - 1));
        const __mmask16 above = _mm512_cmp_ps_mask(key, _mm512_permutexvar_ps(probe, s.points), _CMP_NLE_UQ);
        index = _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(step));
    }
    if (!s.fp4) return index;
    const __mmask16 negative = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ);
    index = _mm512_permutexvar_epi32(index, s.order);
    return _mm512_mask_or_epi32(index, negative, index, _mm512_set1_epi32(8));
}

// Sixteen codes to eight bytes: lanes (even, odd) of a 64-bit word become even << 4 | odd.
FL_INLINE __m128i bytes_of_codes(__m512i index) {
    return _mm512_cvtepi64_epi8(_mm512_or_si512(_mm512_slli_epi64(index, 4), _mm512_srli_epi64(index, 32)));
}

// Sixty-four codes, sixteen a vector, to 32 bytes.
FL_INLINE __m256i bytes_of_codes(__m512i a, __m512i b, __m512i c, __m512i d) {
    // The packs leave four codes a 32-bit word, word 4 l + j from lane l of vector j.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i packed = _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
    const __m512i codes = _mm512_permutexvar_epi32(order, packed);
    return _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x0110)));  // even << 4 | odd
}

// `tame`: all of src is finite, and so is inv.
FL_INLINE void encode_block(const Search& s, const float* src, int64_t count, float inv, bool tame, uint8_t* dst) {
    const vf scale = _mm512_set1_ps(inv);
    int64_t i = 0;
    if (tame && !s.fp4)
        for (; i + 64 <= count; i += 64) {
            __m512i code[4];
            FL_UNROLL
            for (int j = 0; j < 4; ++j)
                code[j] = search_tame(s, _mm512_mul_ps(_mm512_loadu_ps(src + i + 16 * j), scale));
            _mm256_storeu_si256((__m256i*)(dst + i / 2), bytes_of_codes(code[0], code[1], code[2], code[3]));
        }
    if (tame && !s.fp4)
        for (; i + 16 <= count; i += 16)
            _mm_storel_epi64((__m128i*)(dst + i / 2),
                             bytes_of_codes(search_tame(s, _mm512_mul_ps(_mm512_loadu_ps(src + i), scale))));
    for (; i + 16 <= count; i += 16)
        _mm_storel_epi64((__m128i*)(dst + i / 2),
                         bytes_of_codes(search(s, _mm512_mul_ps(_mm512_loadu_ps(src + i), scale))));
    if (i < count) {
        const uint32_t keep = (1u << (count - i)) - 1;
        __m512i index = search(s, _mm512_mul_ps(_mm512_maskz_loadu_ps((__mmask16)keep, src + i), scale));
        index =
            _mm512_mask_mov_epi32(_mm512_set1_epi32(s.fp4 ? 0 : 7), (__mmask16)keep, index);  // the pad nibble means 0
        _mm_mask_storeu_epi8(dst + i / 2, (__mmask16)((1u << ((count - i + 1) / 2)) - 1), bytes_of_codes(index));
    }
}

// Nearest entries of the 8-bit map: a binary search, its later levels in ever larger tables of registers.
struct MapSearch {
    vf coarse, eight, four[2], two[4], one[8];
    MapSearch() {
        float table[16 + 16 + 32 + 64 + 128];
        for (int i = 0; i < 16; ++i) table[i] = i < 15 ? fl_dynamic_mid[16 * i + 15] : __builtin_inff();
        float* to = table + 16;
        for (int step = 8; step; step >>= 1)
            for (int i = 0; i < 256; i += 2 * step) *to++ = fl_dynamic_mid[i + step - 1];
        coarse = _mm512_loadu_ps(table);
        eight = _mm512_loadu_ps(table + 16);
        for (int i = 0; i < 2; ++i) four[i] = _mm512_loadu_ps(table + 32 + 16 * i);
        for (int i = 0; i < 4; ++i) two[i] = _mm512_loadu_ps(table + 64 + 16 * i);
        for (int i = 0; i < 8; ++i) one[i] = _mm512_loadu_ps(table + 128 + 16 * i);
    }
};

// index + step where v is above the point; "not <=" sends NaN up.
FL_INLINE __m512i step_above(vf v, vf point, __m512i index, int step) {
    return _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(v, point, _CMP_NLE_UQ), index, _mm512_set1_epi32(step));
}

FL_INLINE void encode_scales(const MapSearch& s, const float* src, int64_t count, float inv, uint8_t* dst) {
    for (int64_t start = 0; start < count; start += 16) {
        const __mmask16 some = (__mmask16)(count - start >= 16 ? 0xffff : (1 << (count - start)) - 1);
        const vf v = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, src + start), _mm512_set1_ps(inv));
        __m512i index = _mm512_setzero_si512();
        FL_UNROLL
        for (int step = 8; step; step >>= 1) {
            const __m512i probe = _mm512_add_epi32(index, _mm512_set1_epi32(step - 1));
            index = step_above(v, _mm512_permutexvar_ps(probe, s.coarse), index, step);
        }
        index = step_above(v, _mm512_permutexvar_ps(index, s.eight), _mm512_slli_epi32(index, 4), 8);
        __m512i probe = _mm512_srli_epi32(index, 3);  // the later levels' tables have an entry a possible index
        index = step_above(v, _mm512_permutex2var_ps(s.four[0], probe, s.four[1]), index, 4);
        probe = _mm512_srli_epi32(index, 2);
        const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(128));
        index = step_above(v,
                           _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(s.two[0], probe, s.two[1]),
                                                _mm512_permutex2var_ps(s.two[2], probe, s.two[3])),
                           index, 2);
        probe = _mm512_srli_epi32(index, 1);
        const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
        vf part[2];
        FL_UNROLL
        for (int i = 0; i < 2; ++i)
            part[i] = _mm512_mask_blend_ps(odd, _mm512_permutex2var_ps(s.one[4 * i], probe, s.one[4 * i + 1]),
                                           _mm512_permutex2var_ps(s.one[4 * i + 2], probe, s.one[4 * i + 3]));
        index = step_above(v, _mm512_mask_blend_ps(upper, part[0], part[1]), index, 1);
        _mm_mask_storeu_epi8(dst + start, some, _mm512_cvtepi32_epi8(index));
    }
}

// --- dropout ---------------------------------------------------------------------------------------------------------

// Keep bits of 8-column groups group .. group + KEEP_BYTES of a row: Philox4x32-10 with a counter in each 64-bit lane,
// of which only the low half counts. Lanes hold groups 0 4 1 5 2 6 3 7: the unpacking below puts them in order.
enum { KEEP_BYTES = 32 };
FL_INLINE void keep_bytes(uint64_t seed, uint32_t stream, uint64_t row, uint32_t group, uint32_t threshold,
                          uint8_t* out) {
    __m512i c0[4], c1[4], c2[4], c3[4];
    const __m512i lanes = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
        c0[i] = _mm512_add_epi32(_mm512_set1_epi64(group + 8 * i), lanes);
        c1[i] = _mm512_set1_epi64((uint32_t)row);
        c2[i] = _mm512_set1_epi64((int64_t)(row >> 32));
        c3[i] = _mm512_set1_epi64(stream);
    }
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += FL_PHILOX_W0, key1 += FL_PHILOX_W1) {
        const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
        FL_UNROLL
        for (int i = 0; i < 4; ++i) {
            const __m512i p0 = _mm512_mul_epu32(c0[i], _mm512_set1_epi64(FL_PHILOX_M0));
            const __m512i p1 = _mm512_mul_epu32(c2[i], _mm512_set1_epi64(FL_PHILOX_M1));
            c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[i], k0, 0x96);
            c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[i], k1, 0x96);
            c1[i] = p1;
            c3[i] = p0;
        }
    }
    const __m512i least = _mm512_set1_epi16((int16_t)threshold);
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_mask_shuffle_epi32(c0[i], 0xaaaa, c1[i], _MM_PERM_CCAA);
        const __m512i b = _mm512_mask_shuffle_epi32(c2[i], 0xaaaa, c3[i], _MM_PERM_CCAA);
        const uint32_t first = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, b), least);
        const uint32_t second = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, b), least);
        memcpy(out + 8 * i, &first, 4);
        memcpy(out + 8 * i + 4, &second, 4);
    }
}

}  // namespace

#endif
