// AVX2 with FMA and F16C: eight fp32 lanes.
#ifndef FASTLORA_CPU_VEC_AVX2_H
#define FASTLORA_CPU_VEC_AVX2_H

#include <immintrin.h>

#include "common.h"

namespace {

typedef __m256 vf;
#define FL_LOOKUP  // as in vec_avx512.h
enum { W = 8, TILE_ROWS = 6, TILE_VECTORS = 2, ADAPTER_ROWS = 6, RANK_ROWS = 4, HAS_PAIR = 0 };

FL_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
FL_INLINE void vstore(float* p, vf v) { _mm256_storeu_ps(p, v); }
FL_INLINE vf vset1(float v) { return _mm256_set1_ps(v); }
FL_INLINE vf vzero() { return _mm256_setzero_ps(); }
FL_INLINE vf vadd(vf a, vf b) { return _mm256_add_ps(a, b); }
FL_INLINE vf vmul(vf a, vf b) { return _mm256_mul_ps(a, b); }
FL_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FL_INLINE vf vdot(vf, vf, vf c) { return c; }
FL_INLINE vf vpairs(vf low, vf) { return low; }
FL_INLINE float vsum(vf v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The mask bits of lanes i .. i + W - 1, and v with 0 where its bit is 0.
FL_INLINE uint32_t bits_at(const uint8_t* bits, int64_t i) { return bits[i >> 3]; }
FL_INLINE vf vkeep(vf v, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}

FL_INLINE vf vload_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
FL_INLINE vf vload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
FL_INLINE void vstore_bf16(uint16_t* p, vf v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i r = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)));
}
FL_INLINE void vstore_f16(uint16_t* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Streaming stores are weakly ordered: other threads may read the output only after this.
FL_INLINE void stream_fence() { _mm_sfence(); }

// --- decode ----------------------------------------------------------------------------------------------------------

struct Codes {
    const float* code;
    explicit Codes(const float* c) : code(c) {}
};

// Sixteen nibbles of eight bytes in natural order, one a byte.
FL_INLINE __m128i nibbles_of(const uint8_t* p) {
    const __m128i v = _mm_loadl_epi64((const __m128i*)p), mask = _mm_set1_epi8(15);
    return _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(v, 4), mask), _mm_and_si128(v, mask));
}

// Decodes W bytes into their even and their odd columns.
struct Lookup {
    vf low, high;  // entries 0-7 and 8-15
    explicit Lookup(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
    FL_MEMBER Lookup() {}
    FL_MEMBER Lookup scaled(float scale) const {
        Lookup other;
        other.low = vmul(low, vset1(scale));
        other.high = vmul(high, vset1(scale));
        return other;
    }
    FL_MEMBER vf entries(__m256i index) const {  // reads bits 0-2, and bit 3 to choose the half
        const vf half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), half);
    }
    FL_MEMBER void pair(const uint8_t* p, vf w[2]) const {
        const __m256i nibbles = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
        w[0] = entries(_mm256_srli_epi32(nibbles, 4));
        w[1] = entries(nibbles);
    }
};

FL_INLINE void vsplit(const float* src, vf out[2]) {
    const vf a = vload(src), b = vload(src + W);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    out[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
    out[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
}
FL_INLINE void vunsplit(float* inout) {
    const vf even = vload(inout), odd = vload(inout + W);
    const vf low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    vstore(inout, _mm256_permute2f128_ps(low, high, 0x20));
    vstore(inout + W, _mm256_permute2f128_ps(low, high, 0x31));
}

template <bool STREAM>
FL_INLINE void span_f32(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                        float* dst) {
    const vf scale = _mm256_set1_ps(absmax);
    const vf low = _mm256_mul_ps(_mm256_loadu_ps(codes.code), scale),
             high = _mm256_mul_ps(_mm256_loadu_ps(codes.code + 8), scale);
    const uint8_t* p = packed + (flat >> 1);
    if (!STREAM && (flat & 1)) {
        if (count < 1) return;
        *dst++ = codes.code[*p++ & 15] * absmax;
        --count;
    }
    for (; count >= 16; count -= 16, p += 8, dst += 16) {
        const __m128i n = nibbles_of(p);
        for (int half = 0; half < 2; ++half) {
            const __m256i i = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(n, 8) : n);
            const vf pick = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // bit 3 of the index chooses the half
            const vf v = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), pick);
            if (STREAM) _mm256_stream_ps(dst + 8 * half, v);
            else _mm256_storeu_ps(dst + 8 * half, v);
        }
    }
    for (int64_t i = 0; i < count; ++i) dst[i] = codes.code[i & 1 ? p[i >> 1] & 15 : p[i >> 1] >> 4] * absmax;
}

// Sixteen-entry byte tables: the low and the high byte of each rounded entry.
template <bool STREAM, bool FOR_DOT = false>
FL_INLINE void span_16(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                       int64_t dtype, uint16_t* dst) {
    const vf scale = _mm256_set1_ps(absmax);
    alignas(32) uint16_t table[16];
    for (int i = 0; i < 16; i += 8) {
        const vf v = _mm256_mul_ps(_mm256_loadu_ps(codes.code + i), scale);
        if (dtype == BF16) vstore_bf16(table + i, v);
        else vstore_f16(table + i, v);
    }
    const __m128i a = _mm_load_si128((const __m128i*)table), b = _mm_load_si128((const __m128i*)(table + 8));
    const __m128i byte = _mm_set1_epi16(255);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    const uint8_t* p = packed + (flat >> 1);
    if (!STREAM && (flat & 1)) {
        if (count < 1) return;
        *dst++ = table[*p++ & 15];
        --count;
    }
    for (; count >= 16; count -= 16, p += 8, dst += 16) {
        const __m128i n = nibbles_of(p), l = _mm_shuffle_epi8(low, n), h = _mm_shuffle_epi8(high, n);
        if (STREAM) {
            _mm_stream_si128((__m128i*)dst, _mm_unpacklo_epi8(l, h));
            _mm_stream_si128((__m128i*)(dst + 8), _mm_unpackhi_epi8(l, h));
        } else {
            _mm_storeu_si128((__m128i*)dst, _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128((__m128i*)(dst + 8), _mm_unpackhi_epi8(l, h));
        }
    }
    for (int64_t i = 0; i < count; ++i) dst[i] = table[i & 1 ? p[i >> 1] & 15 : p[i >> 1] >> 4];
}

// --- dropout ---------------------------------------------------------------------------------------------------------

// As in vec_avx512.h, with groups 0 1 2 3 in the lanes.
enum { KEEP_BYTES = 16 };
FL_INLINE void keep_bytes(uint64_t seed, uint32_t stream, uint64_t row, uint32_t group, uint32_t threshold,
                          uint8_t* out) {
    for (int i = 0; i < KEEP_BYTES; i += 8) {
        __m256i c0[2], c1[2], c2[2], c3[2];
        FL_UNROLL
        for (int j = 0; j < 2; ++j) {
            c0[j] = _mm256_add_epi32(_mm256_set1_epi64x(group + i + 4 * j), _mm256_setr_epi64x(0, 1, 2, 3));
            c1[j] = _mm256_set1_epi64x((uint32_t)row);
            c2[j] = _mm256_set1_epi64x((int64_t)(row >> 32));
            c3[j] = _mm256_set1_epi64x(stream);
        }
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; ++round, key0 += FL_PHILOX_W0, key1 += FL_PHILOX_W1) {
            const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
            FL_UNROLL
            for (int j = 0; j < 2; ++j) {
                const __m256i p0 = _mm256_mul_epu32(c0[j], _mm256_set1_epi64x(FL_PHILOX_M0));
                const __m256i p1 = _mm256_mul_epu32(c2[j], _mm256_set1_epi64x(FL_PHILOX_M1));
                c0[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[j]), k0);
                c2[j] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[j]), k1);
                c1[j] = p1;
                c3[j] = p0;
            }
        }
        const __m256i least = _mm256_set1_epi16((int16_t)threshold);
        FL_UNROLL
        for (int j = 0; j < 2; ++j) {
            const __m256i a = _mm256_blend_epi32(c0[j], _mm256_slli_epi64(c1[j], 32), 0xaa);
            const __m256i b = _mm256_blend_epi32(c2[j], _mm256_slli_epi64(c3[j], 32), 0xaa);
            const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
            const __m256i first = _mm256_cmpeq_epi16(_mm256_max_epu16(even, least), even);
            const __m256i second = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, least), odd);
            const int32_t bits = _mm256_movemask_epi8(_mm256_packs_epi16(first, second));
            memcpy(out + i + 4 * j, &bits, 4);
        }
    }
}

}  // namespace

#include "portable.h"

#endif
