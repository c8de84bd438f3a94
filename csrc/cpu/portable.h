// Pieces the tiers below AVX-512 share: plain loops the compiler vectorises for each of them.
#ifndef FASTLORA_CPU_PORTABLE_H
#define FASTLORA_CPU_PORTABLE_H

namespace {

// Nested scales to fp32: map[code] * nested + offset, two roundings.
FL_INLINE void expand_scales(const uint8_t* codes, float nested, float offset, int64_t count, float* dst) {
    for (int64_t i = 0; i < count; ++i) dst[i] = fl_dynamic_map[codes[i]] * nested + offset;
}

FL_INLINE void interleave_16(const uint16_t* low, const uint16_t* high, int64_t count, uint32_t* dst) {
    for (int64_t i = 0; i < count; ++i) dst[i] = low[i] | ((uint32_t)high[i] << 16);
}

struct Search {
    bool fp4;
    explicit Search(bool is_fp4) : fp4(is_fp4) {}
};

// How many decision points are below each value; "not <=" sends NaN to the highest code.
template <int POINTS>
FL_INLINE void count_below(const float* points, const float* v, int32_t* index) {
    for (int i = 0; i < 32; ++i) {
        int32_t n = POINTS;
        for (int j = 0; j < POINTS; ++j) n -= v[i] <= points[j];
        index[i] = n;
    }
}

FL_INLINE void encode_block(const Search& s, const float* src, int64_t count, float inv, bool, uint8_t* dst) {
    for (int64_t start = 0; start < count; start += 32) {
        float v[32] = {};
        int32_t index[32];
        const int64_t here = min64(32, count - start);
        for (int64_t i = 0; i < here; ++i) v[i] = src[start + i] * inv;
        if (s.fp4) {
            float magnitude[32];
            for (int i = 0; i < 32; ++i) magnitude[i] = float_of(bits_of(v[i]) & 0x7fffffffu);
            count_below<7>(fl_fp4_mid, magnitude, index);
            for (int i = 0; i < 32; ++i) index[i] = fl_fp4_order[index[i]] | (v[i] < 0 ? 8 : 0);
        } else {
            count_below<15>(fl_nf4_mid, v, index);  // beyond `here` v is 0, whose code is the pad nibble
        }
        for (int64_t i = 0; i < here; i += 2) dst[(start + i) / 2] = (uint8_t)(index[i] << 4 | index[i + 1]);
    }
}

// Sixteen binary searches in step, without branches.
struct MapSearch {};
FL_INLINE void encode_scales(const MapSearch&, const float* src, int64_t count, float inv, uint8_t* dst) {
    for (int64_t start = 0; start < count; start += 16) {
        float v[16] = {};
        int32_t index[16] = {};
        const int64_t here = min64(16, count - start);
        for (int64_t i = 0; i < here; ++i) v[i] = src[start + i] * inv;
        for (int step = 128; step; step >>= 1)
            for (int i = 0; i < 16; ++i) index[i] += step & -(int32_t)!(v[i] <= fl_dynamic_mid[index[i] + step - 1]);
        for (int64_t i = 0; i < here; ++i) dst[start + i] = (uint8_t)index[i];
    }
}

}  // namespace

#endif
