// Numbers and the 4-bit format, for the device and, through emulate.h, for the host. The oracle is
// fastlora/math/nf4.py, bit for bit. Nothing here may contract a product and a sum: the build passes --fmad=false, and
// where one rounding is wanted fmaf says so.
#ifndef FASTLORA_CUDA_DEVICE_H
#define FASTLORA_CUDA_DEVICE_H

#include <math.h>
#include <string.h>

#include "args.h"
#include "platform.h"

#include "../include/nf4_table.h"
#include "../include/philox.h"

enum { NESTED_BLOCKSIZE = 256, LANES_OF_WARP = 32 };

FL_BOTH uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
FL_BOTH float float_of(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// --- storage types: how a float is kept ------------------------------------------------------------------------------

struct F32Type {
    enum { dtype = F32, is_bf16 = 0 };
};
struct Bf16Type {
    enum { dtype = BF16, is_bf16 = 1 };
};
struct F16Type {
    enum { dtype = F16, is_bf16 = 0 };
};

FL_BOTH float widen(uint16_t v, int64_t dtype) {
    if (dtype == BF16) return float_of((uint32_t)v << 16);
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v));
    return wide;
#else
    const uint32_t sign = (uint32_t)(v & 0x8000u) << 16, magnitude = v & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));  // also right for subnormal numbers
#endif
}

// To nearest even; any NaN becomes some NaN.
FL_BOTH uint16_t narrow(float v, int64_t dtype) {
#ifdef __CUDA_ARCH__
    uint16_t out;
    if (dtype == BF16) {
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(v));
    } else {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
    }
    return out;
#else
    const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
    if (dtype == BF16) {
        if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7fc0u);
        return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded number in the last bits
        return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    return (uint16_t)(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
#endif
}

// Two floats as two 16-bit numbers, the first in the low half.
FL_BOTH uint32_t narrow_pair(float low, float high, int64_t dtype) {
#ifdef __CUDA_ARCH__
    uint32_t out;
    if (dtype == BF16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    }
    return out;
#else
    return (uint32_t)narrow(low, dtype) | (uint32_t)narrow(high, dtype) << 16;
#endif
}

FL_DEVICE float read(const void* p, int64_t dtype, int64_t index) {
    if (dtype == F32) return load<float>((const float*)p + index);
    return widen(load<uint16_t>((const uint16_t*)p + index), dtype);
}

FL_DEVICE void write(void* p, int64_t dtype, int64_t index, float v) {
    if (dtype == F32) store((float*)p + index, v);
    else store((uint16_t*)p + index, narrow(v, dtype));
}

// Eight neighbours as fp32. `wide`: their address is a multiple of 16 bytes; else `count` of them exist, the rest is 0.
FL_DEVICE void read8(const void* p, int64_t dtype, int64_t index, bool wide, int64_t count, float out[8]) {
    if (!wide) {
        FL_UNROLL
        for (int i = 0; i < 8; ++i) out[i] = i < count ? read(p, dtype, index + i) : 0.0f;
    } else if (dtype == F32) {
        const float4 low = load<float4>((const float*)p + index), high = load<float4>((const float*)p + index + 4);
        out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
        out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
    } else {
        const uint4 v = load<uint4>((const uint16_t*)p + index);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
        FL_UNROLL
        for (int i = 0; i < 8; ++i) out[i] = widen((uint16_t)(words[i / 2] >> (16 * (i % 2))), dtype);
    }
}

FL_DEVICE void write8(void* p, int64_t dtype, int64_t index, bool wide, int64_t count, const float v[8]) {
    if (!wide) {
        FL_UNROLL
        for (int i = 0; i < 8; ++i)
            if (i < count) write(p, dtype, index + i, v[i]);
    } else if (dtype == F32) {
        store((float*)p + index, float4{v[0], v[1], v[2], v[3]});
        store((float*)p + index + 4, float4{v[4], v[5], v[6], v[7]});
    } else {
        uint32_t words[4];
        FL_UNROLL
        for (int i = 0; i < 4; ++i) words[i] = narrow_pair(v[2 * i], v[2 * i + 1], dtype);
        store((uint16_t*)p + index, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// --- the 4-bit format ------------------------------------------------------------------------------------------------

// Value of a code, by the weight's own table or the standard one.
FL_DEVICE float code_value(const Weight& w, int code) {
    if (w.code) return load<float>(w.code + code);
    return w.kind == FP4 ? fl_fp4_code[code] : fl_nf4_code[code];
}

// map[u8] * absmax2 + offset: two roundings.
FL_DEVICE float nested_scale(float entry, float absmax2, float offset) { return entry * absmax2 + offset; }

// The scale of a block; `map`: fl_dynamic_map where a lookup is cheap.
FL_DEVICE float scale_of(const Weight& w, const float* map, int64_t block) {
    if (w.absmax) return load<float>(w.absmax + block);
    const float entry = map[load<uint8_t>(w.absmax_codes + block)];
    return nested_scale(entry, load<float>(w.nested_absmax + block / NESTED_BLOCKSIZE), load<float>(w.nested_offset));
}

FL_BOTH int shift_of(int64_t blocksize) {
    int shift = 5;
    while (((int64_t)1 << shift) < blocksize) ++shift;
    return shift;
}

// What a thread block keeps in shared memory to decode. Each lane has a copy of the sixteen values, in its own bank, so
// that no two lanes ever wait for each other.
struct Tables {
    float codes[16][LANES_OF_WARP];
    float map[256];
};

// To be followed by a barrier.
FL_DEVICE void fill_tables(const Weight& w, Tables& tables, int threads) {
    for (int i = (int)threadIdx.x; i < 16 * LANES_OF_WARP; i += threads)
        tables.codes[i / LANES_OF_WARP][i % LANES_OF_WARP] = code_value(w, i / LANES_OF_WARP);
    if (!w.absmax)
        for (int i = (int)threadIdx.x; i < 256; i += threads) tables.map[i] = fl_dynamic_map[i];
}

// The nibble of flat element i.
FL_DEVICE uint32_t nibble(const Weight& w, int64_t i) {
    const uint32_t byte = load<uint8_t>(w.packed + i / 2);
    return i % 2 ? byte & 15 : byte >> 4;
}

// Elements flat .. flat + 7 as fp32. `wide`: flat is a multiple of 8, packed of 4 bytes, and all eight exist; else
// `count` of them exist, the rest is 0.
FL_DEVICE void decode8(const Weight& w, const Tables& tables, int shift, int64_t flat, bool wide, int64_t count,
                       float out[8]) {
    const int lane = (int)threadIdx.x % LANES_OF_WARP;
    if (wide) {
        const uint32_t word = load<uint32_t>(w.packed + flat / 2);
        const float scale = scale_of(w, tables.map, flat >> shift);
        FL_UNROLL
        for (int i = 0; i < 8; ++i)  // byte i / 2, its high nibble first
            out[i] = tables.codes[word >> (8 * (i / 2) + (i % 2 ? 0 : 4)) & 15][lane] * scale;
        return;
    }
    FL_UNROLL
    for (int i = 0; i < 8; ++i) {
        out[i] = 0.0f;
        if (i < count) out[i] = tables.codes[nibble(w, flat + i)][lane] * scale_of(w, tables.map, (flat + i) >> shift);
    }
}

FL_BOTH bool is_aligned(const void* p, int bytes) { return ((uintptr_t)p & (uintptr_t)(bytes - 1)) == 0; }

#endif
