// Scalar helpers each tier compiles for itself (everything here has internal linkage: code built for one instruction
// set must never be linked into another tier).
#ifndef FASTLORA_CPU_COMMON_H
#define FASTLORA_CPU_COMMON_H

#include <stdint.h>
#include <string.h>

#include "../include/nf4_table.h"
#include "../include/philox.h"
#include "args.h"

#define FL_INLINE static inline __attribute__((always_inline, unused))
#define FL_MEMBER inline __attribute__((always_inline, unused))
#define FL_UNROLL _Pragma("GCC unroll 32")

namespace {

FL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FL_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

FL_INLINE uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}
FL_INLINE float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

FL_INLINE float bf16_to_f32(uint16_t v) { return float_of((uint32_t)v << 16); }

// Round to nearest even; every NaN becomes the quiet one, because the integer trick could wrap it to infinity.
FL_INLINE uint16_t f32_to_bf16(float v) {
    const uint32_t u = bits_of(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

FL_INLINE float f16_to_f32(uint16_t v) {
    const uint32_t sign = (uint32_t)(v & 0x8000) << 16, exponent = (v >> 10) & 31, fraction = v & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (fraction << 13));
    if (exponent) return float_of(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float tiny = (float)fraction * 5.9604644775390625e-8f;  // 2^-24, exact
    return float_of(bits_of(tiny) | sign);
}

FL_INLINE uint16_t f32_to_f16(float v) {
    const uint32_t u = bits_of(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x47800000u) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000u) {  // subnormal: adding 0.5 puts 2^-24 at the last bit, and the adder rounds
        const float shifted = float_of(rest) + 0.5f;
        return (uint16_t)(sign | (bits_of(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1) - 0x38000000u;  // may carry up to infinity
    return (uint16_t)(sign | (rounded >> 13));
}

FL_INLINE float to_f32_one(const void* src, int64_t dtype, int64_t i) {
    if (dtype == F32) return ((const float*)src)[i];
    const uint16_t v = ((const uint16_t*)src)[i];
    return dtype == BF16 ? bf16_to_f32(v) : f16_to_f32(v);
}

FL_INLINE void from_f32_one(float v, void* dst, int64_t dtype, int64_t i) {
    if (dtype == F32) ((float*)dst)[i] = v;
    else ((uint16_t*)dst)[i] = dtype == BF16 ? f32_to_bf16(v) : f32_to_f16(v);
}

FL_INLINE int64_t item_size(int64_t dtype) { return dtype == F32 ? 4 : 2; }
FL_INLINE const void* at(const void* base, int64_t dtype, int64_t i) {
    return (const char*)base + i * item_size(dtype);
}
FL_INLINE void* at(void* base, int64_t dtype, int64_t i) { return (char*)base + i * item_size(dtype); }

FL_INLINE const float* code_of(const Args& args) {
    if (args.code) return args.code;
    return args.kind == FP4 ? fl_fp4_code : fl_nf4_code;
}

// Next piece of work of a phase. Relaxed is enough: pieces are independent and phases end with a barrier.
FL_INLINE int64_t next_piece(int64_t* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

FL_INLINE void team_barrier(const Args& args) {
    if (args.threads < 2) return;  // no team of ours: a barrier would bind to a region of the caller
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace

#endif
