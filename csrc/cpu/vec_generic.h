// Any CPU: four fp32 lanes as a compiler vector, which is SSE2 or NEON where those are the baseline.
#ifndef FASTLORA_CPU_VEC_GENERIC_H
#define FASTLORA_CPU_VEC_GENERIC_H

#include "common.h"

namespace {

typedef float vf __attribute__((vector_size(16)));
enum { W = 4, TILE_ROWS = 4, TILE_VECTORS = 2, ADAPTER_ROWS = 6, RANK_ROWS = 4, HAS_PAIR = 0 };

FL_INLINE vf vload(const float* p) {
    vf v;
    memcpy(&v, p, 16);
    return v;
}
FL_INLINE void vstore(float* p, vf v) { memcpy(p, &v, 16); }
FL_INLINE vf vset1(float v) { return vf{v, v, v, v}; }
FL_INLINE vf vzero() { return vf{0, 0, 0, 0}; }
FL_INLINE vf vadd(vf a, vf b) { return a + b; }
FL_INLINE vf vmul(vf a, vf b) { return a * b; }
FL_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
FL_INLINE vf vdot(vf, vf, vf c) { return c; }
FL_INLINE vf vpairs(vf low, vf) { return low; }
FL_INLINE float vsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// The mask bits of lanes i .. i + W - 1, and v with 0 where its bit is 0.
FL_INLINE uint32_t bits_at(const uint8_t* bits, int64_t i) { return (uint32_t)bits[i >> 3] >> (i & 7); }
FL_INLINE vf vkeep(vf v, uint32_t bits) {
    for (int i = 0; i < W; ++i)
        if (!(bits >> i & 1)) v[i] = 0;
    return v;
}

FL_INLINE vf vload_bf16(const uint16_t* p) {
    return vf{bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
FL_INLINE vf vload_f16(const uint16_t* p) {
    return vf{f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
FL_INLINE void vstore_bf16(uint16_t* p, vf v) {
    for (int i = 0; i < 4; ++i) p[i] = f32_to_bf16(v[i]);
}
FL_INLINE void vstore_f16(uint16_t* p, vf v) {
    for (int i = 0; i < 4; ++i) p[i] = f32_to_f16(v[i]);
}

FL_INLINE void stream_fence() {}

struct Codes {
    const float* code;
    explicit Codes(const float* c) : code(c) {}
};

template <class T>
FL_INLINE void span_table(const T* table, const uint8_t* packed, int64_t flat, int64_t count, T* dst) {
    const uint8_t* p = packed + (flat >> 1);
    if ((flat & 1) && count > 0) {
        *dst++ = table[*p++ & 15];
        --count;
    }
    for (; count >= 2; count -= 2, ++p, dst += 2) {
        dst[0] = table[*p >> 4];
        dst[1] = table[*p & 15];
    }
    if (count > 0) *dst = table[*p >> 4];
}

template <bool STREAM>
FL_INLINE void span_f32(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                        float* dst) {
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = codes.code[i] * absmax;
    span_table(table, packed, flat, count, dst);
}

template <bool STREAM, bool FOR_DOT = false>
FL_INLINE void span_16(const Codes& codes, float absmax, const uint8_t* packed, int64_t flat, int64_t count,
                       int64_t dtype, uint16_t* dst) {
    uint16_t table[16];
    for (int i = 0; i < 16; ++i) from_f32_one(codes.code[i] * absmax, table, dtype, i);
    span_table(table, packed, flat, count, dst);
}

enum { KEEP_BYTES = 16 };
FL_INLINE void keep_bytes(uint64_t seed, uint32_t stream, uint64_t row, uint32_t group, uint32_t threshold,
                          uint8_t* out) {
    for (uint32_t i = 0; i < KEEP_BYTES; ++i) out[i] = fl_keep_bits(seed, stream, row, group + i, threshold);
}

}  // namespace

#include "portable.h"

#endif
