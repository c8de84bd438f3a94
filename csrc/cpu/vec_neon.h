// NEON, the baseline of every 64-bit ARM: eight fp32 lanes in two registers, so that a vector meets one byte of a mask
// and eight packed bytes, as on AVX2. No dot products: bf16 is fp32 inside.
#ifndef FASTLORA_CPU_VEC_NEON_H
#define FASTLORA_CPU_VEC_NEON_H

#include <arm_neon.h>

#include "common.h"

namespace {

struct vf {
    float32x4_t low, high;
};
#define FL_LOOKUP  // as in vec_avx512.h
#define FL_TURN 4  // as in vec_avx512.h
enum { W = 8, TILE_ROWS = 6, TILE_VECTORS = 2, ADAPTER_ROWS = 6, RANK_ROWS = 4, HAS_PAIR = 0 };

FL_INLINE vf vload(const float* p) { return vf{vld1q_f32(p), vld1q_f32(p + 4)}; }
FL_INLINE void vstore(float* p, vf v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
}
FL_INLINE vf vset1(float v) { return vf{vdupq_n_f32(v), vdupq_n_f32(v)}; }
FL_INLINE vf vzero() { return vset1(0); }
FL_INLINE vf vadd(vf a, vf b) { return vf{vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
FL_INLINE vf vmul(vf a, vf b) { return vf{vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
FL_INLINE vf vfma(vf a, vf b, vf c) { return vf{vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
FL_INLINE vf vdot(vf, vf, vf c) { return c; }
FL_INLINE vf vpairs(vf low, vf) { return low; }
FL_INLINE float vsum(vf v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }

// The mask bits of lanes i .. i + W - 1, and v with 0 where its bit is 0.
FL_INLINE uint32_t bits_at(const uint8_t* bits, int64_t i) { return bits[i >> 3]; }
FL_INLINE float32x4_t keep_lanes(float32x4_t v, uint32x4_t set) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), set));
}
FL_INLINE vf vkeep(vf v, uint32_t bits) {
    const uint32x4_t all = vdupq_n_u32(bits), first = {1, 2, 4, 8}, second = {16, 32, 64, 128};
    return vf{keep_lanes(v.low, vtstq_u32(all, first)), keep_lanes(v.high, vtstq_u32(all, second))};
}

FL_INLINE vf vload_bf16(const uint16_t* p) {
    const uint16x8_t v = vld1q_u16(p);
    return vf{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)),
              vreinterpretq_f32_u32(vshll_high_n_u16(v, 16))};
}
FL_INLINE vf vload_f16(const uint16_t* p) {
    const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(p));
    return vf{vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
}
// To nearest even, NaN made quiet, as `f32_to_bf16`.
FL_INLINE uint16x4_t round_bf16(float32x4_t v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint16x4_t up = vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), up, vdup_n_u16(0x7fc0));
}
FL_INLINE uint16x4_t round_f16(float32x4_t v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
FL_INLINE uint16x8_t round_16(vf v, int64_t dtype) {
    if (dtype == BF16) return vcombine_u16(round_bf16(v.low), round_bf16(v.high));
    return vcombine_u16(round_f16(v.low), round_f16(v.high));
}
FL_INLINE void vstore_bf16(uint16_t* p, vf v) { vst1q_u16(p, round_16(v, BF16)); }
FL_INLINE void vstore_f16(uint16_t* p, vf v) { vst1q_u16(p, round_16(v, F16)); }

// dst[j * ldd + i] = src[i * ld + j] for 4 x 4 elements of 4 bytes.
FL_INLINE void transpose_block(const float* src, int64_t ld, float* dst, int64_t ldd) {
    const float32x4_t a = vld1q_f32(src), b = vld1q_f32(src + ld);
    const float32x4_t c = vld1q_f32(src + 2 * ld), d = vld1q_f32(src + 3 * ld);
    const float64x2_t even_ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
    const float64x2_t odd_ab = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t even_cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d));
    const float64x2_t odd_cd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    vst1q_f32(dst, vreinterpretq_f32_f64(vtrn1q_f64(even_ab, even_cd)));
    vst1q_f32(dst + ldd, vreinterpretq_f32_f64(vtrn1q_f64(odd_ab, odd_cd)));
    vst1q_f32(dst + 2 * ldd, vreinterpretq_f32_f64(vtrn2q_f64(even_ab, even_cd)));
    vst1q_f32(dst + 3 * ldd, vreinterpretq_f32_f64(vtrn2q_f64(odd_ab, odd_cd)));
}

FL_INLINE void stream_fence() {}

// --- decode ----------------------------------------------------------------------------------------------------------

// A table of sixteen fp32 entries as its four byte planes: a table instruction looks up sixteen codes in one plane.
struct Planes {
    uint8x16_t byte[4];
    explicit Planes(const float* code) {
        const uint8x16x4_t planes = vld4q_u8((const uint8_t*)code);
        FL_UNROLL
        for (int i = 0; i < 4; ++i) byte[i] = planes.val[i];
    }
    FL_MEMBER Planes() {}
    // Sixteen codes, one a byte and below 16, in their order.
    FL_MEMBER void entries(uint8x16_t index, float32x4_t out[4]) const {
        const uint8x16_t b0 = vqtbl1q_u8(byte[0], index), b1 = vqtbl1q_u8(byte[1], index);
        const uint8x16_t b2 = vqtbl1q_u8(byte[2], index), b3 = vqtbl1q_u8(byte[3], index);
        const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
        const uint16x8_t top0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), top1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
        out[0] = vreinterpretq_f32_u16(vzip1q_u16(low0, top0));
        out[1] = vreinterpretq_f32_u16(vzip2q_u16(low0, top0));
        out[2] = vreinterpretq_f32_u16(vzip1q_u16(low1, top1));
        out[3] = vreinterpretq_f32_u16(vzip2q_u16(low1, top1));
    }
};

struct Codes {
    const float* code;
    Planes planes;
    explicit Codes(const float* c) : code(c), planes(c) {}
};

// Sixteen nibbles of eight bytes in natural order, one a byte.
FL_INLINE uint8x16_t nibbles_of(const uint8_t* p) {
    const uint8x8_t v = vld1_u8(p), high = vshr_n_u8(v, 4), low = vand_u8(v, vdup_n_u8(15));
    return vcombine_u8(vzip1_u8(high, low), vzip2_u8(high, low));
}

// Decodes W bytes into their even and their odd columns.
struct Lookup {
    Planes planes;
    explicit Lookup(const float* code) : planes(code) {}
    FL_MEMBER Lookup() {}
    FL_MEMBER void pair(const uint8_t* p, vf w[2]) const {
        const uint8x8_t v = vld1_u8(p);
        float32x4_t entry[4];
        planes.entries(vcombine_u8(vshr_n_u8(v, 4), vand_u8(v, vdup_n_u8(15))), entry);
        w[0] = vf{entry[0], entry[1]};
        w[1] = vf{entry[2], entry[3]};
    }
    // The planes stay those of the plain table, so that all rows share their registers; the products are the same.
    struct Scaled;
    FL_MEMBER Scaled scaled(float scale) const;
};
struct Lookup::Scaled {
    Lookup plain;
    vf scale;
    FL_MEMBER void pair(const uint8_t* p, vf w[2]) const {
        plain.pair(p, w);
        w[0] = vmul(w[0], scale);
        w[1] = vmul(w[1], scale);
    }
};
FL_MEMBER Lookup::Scaled Lookup::scaled(float scale) const { return Scaled{*this, vset1(scale)}; }

// 2 W numbers <-> their even and their odd ones.
FL_INLINE void vsplit(const float* src, vf out[2]) {
    const float32x4x2_t a = vld2q_f32(src), b = vld2q_f32(src + W);
    out[0] = vf{a.val[0], b.val[0]};
    out[1] = vf{a.val[1], b.val[1]};
}
FL_INLINE void vunsplit(float* inout) {
    const vf even = vload(inout), odd = vload(inout + W);
    vst2q_f32(inout, float32x4x2_t{{even.low, odd.low}});
    vst2q_f32(inout + W, float32x4x2_t{{even.high, odd.high}});
}

template <bool STREAM>
FL_INLINE void span_f32(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                        float* dst) {
    const uint8_t* p = packed + (flat >> 1);
    if ((flat & 1) && count > 0) {
        *dst++ = codes.code[*p++ & 15] * absmax;
        --count;
    }
    const float32x4_t scale = vdupq_n_f32(absmax);
    for (; count >= 16; count -= 16, p += 8, dst += 16) {
        float32x4_t entry[4];
        codes.planes.entries(nibbles_of(p), entry);
        FL_UNROLL
        for (int i = 0; i < 4; ++i) vst1q_f32(dst + 4 * i, vmulq_f32(entry[i], scale));
    }
    for (int64_t i = 0; i < count; ++i) dst[i] = codes.code[i & 1 ? p[i >> 1] & 15 : p[i >> 1] >> 4] * absmax;
}

// The scaled table is rounded, once a block; then two planes are enough.
template <bool STREAM, bool FOR_DOT = false>
FL_INLINE void span_16(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                       int64_t dtype, uint16_t* dst) {
    const vf scale = vset1(absmax);
    const uint16x8_t first = round_16(vmul(vload(codes.code), scale), dtype);
    const uint16x8_t second = round_16(vmul(vload(codes.code + 8), scale), dtype);
    uint16_t table[16];
    vst1q_u16(table, first);
    vst1q_u16(table + 8, second);
    const uint8x16_t low = vuzp1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
    const uint8x16_t high = vuzp2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
    const uint8_t* p = packed + (flat >> 1);
    if ((flat & 1) && count > 0) {
        *dst++ = table[*p++ & 15];
        --count;
    }
    for (; count >= 16; count -= 16, p += 8, dst += 16) {
        const uint8x16_t n = nibbles_of(p), l = vqtbl1q_u8(low, n), h = vqtbl1q_u8(high, n);
        vst1q_u16(dst, vreinterpretq_u16_u8(vzip1q_u8(l, h)));
        vst1q_u16(dst + 8, vreinterpretq_u16_u8(vzip2q_u8(l, h)));
    }
    for (int64_t i = 0; i < count; ++i) dst[i] = table[i & 1 ? p[i >> 1] & 15 : p[i >> 1] >> 4];
}

// --- dropout ---------------------------------------------------------------------------------------------------------

// v * factor, its low and its high words.
FL_INLINE void multiply(uint32x4_t v, uint32_t factor, uint32x4_t& low, uint32x4_t& high) {
    const uint32x4_t a = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(v), factor));
    const uint32x4_t b = vreinterpretq_u32_u64(vmull_high_n_u32(v, factor));
    low = vuzp1q_u32(a, b);
    high = vuzp2q_u32(a, b);
}

// Keep bits of 8-column groups group .. group + KEEP_BYTES of a row: Philox4x32-10, four groups' counters a vector.
enum { KEEP_BYTES = 16 };
FL_INLINE void keep_bytes(uint64_t seed, uint32_t stream, uint64_t row, uint32_t group, uint32_t threshold,
                          uint8_t* out) {
    const uint32x4_t lanes = {0, 1, 2, 3};
    const uint16x8_t least = vdupq_n_u16((uint16_t)threshold), weights = {1, 2, 1, 2, 1, 2, 1, 2};
    uint16x8_t bits[4];  // of each group in two lanes, which are yet to be added
    FL_UNROLL
    for (int i = 0; i < 4; ++i) {
        uint32x4_t word[4] = {vaddq_u32(vdupq_n_u32(group + 4 * i), lanes), vdupq_n_u32((uint32_t)row),
                              vdupq_n_u32((uint32_t)(row >> 32)), vdupq_n_u32(stream)};
        uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; ++round, key0 += FL_PHILOX_W0, key1 += FL_PHILOX_W1) {
            uint32x4_t low0, high0, low1, high1;
            multiply(word[0], FL_PHILOX_M0, low0, high0);
            multiply(word[2], FL_PHILOX_M1, low1, high1);
            word[0] = veorq_u32(veorq_u32(high1, word[1]), vdupq_n_u32(key0));
            word[2] = veorq_u32(veorq_u32(high0, word[3]), vdupq_n_u32(key1));
            word[1] = low1;
            word[3] = low0;
        }
        bits[i] = vdupq_n_u16(0);
        FL_UNROLL
        for (int j = 0; j < 4; ++j) {
            const uint16x8_t keep = vcgeq_u16(vreinterpretq_u16_u32(word[j]), least);
            bits[i] = vorrq_u16(bits[i], vandq_u16(keep, vshlq_u16(weights, vdupq_n_s16((int16_t)(2 * j)))));
        }
    }
    const uint16x8_t first = vpaddq_u16(bits[0], bits[1]), second = vpaddq_u16(bits[2], bits[3]);
    vst1q_u8(out, vcombine_u8(vmovn_u16(first), vmovn_u16(second)));
}

}  // namespace

#include "portable.h"

#endif
