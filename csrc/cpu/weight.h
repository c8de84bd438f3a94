// Reading the frozen weight: scales, row segments and tiles. Nothing here allocates or writes the weight.
#ifndef FASTLORA_CPU_WEIGHT_H
#define FASTLORA_CPU_WEIGHT_H

namespace {

enum { NESTED = 256 };

// The fp32 scales of blocks first .. last - 1.
static void scales_of(const Args& args, int64_t first, int64_t last, float* dst) {
    if (args.absmax) {
        memcpy(dst, args.absmax + first, (size_t)(last - first) * 4);
        return;
    }
    for (int64_t block = first; block < last;) {
        const int64_t group = block / NESTED, stop = min64(last, (group + 1) * NESTED);
        expand_scales(args.absmax_codes + block, args.nested_absmax[group], args.nested_offset[0], stop - block,
                      dst + (block - first));
        block = stop;
    }
}

// A weight whose scales, from block `first` on, are at hand as fp32.
struct Source {
    const Args& args;
    Codes codes;
    int shift;
    const float* scales;
    int64_t first;
    explicit Source(const Args& a)
        : args(a),
          codes(code_of(a)),
          shift(a.kind == DENSE ? 0 : __builtin_ctzll((unsigned long long)a.blocksize)),
          scales(a.absmax),
          first(0) {}
    // Make the scales of the flat range [from, to) at hand, in `buffer` where they are nested.
    void use_scales(int64_t from, int64_t to, float* buffer) {
        if (args.kind == DENSE || args.absmax || from >= to) return;
        first = from >> shift;
        scales_of(args, first, ((to - 1) >> shift) + 1, buffer);
        scales = buffer;
    }
};

// w[row, from .. to) as fp32.
static void read_f32(const Source& s, int64_t row, int64_t from, int64_t to, float* dst) {
    int64_t flat = row * s.args.k + from;
    const int64_t end = row * s.args.k + to;
    if (s.args.kind == DENSE) return to_f32(s.args.dense, s.args.dtype, flat, end - flat, dst);
    while (flat < end) {
        const int64_t block = flat >> s.shift, stop = min64(end, (block + 1) << s.shift);
        span_f32<false>(s.codes, s.scales[block - s.first], s.args.packed, flat, stop - flat, dst);
        dst += stop - flat;
        flat = stop;
    }
}

// w[row, from .. to) as bf16, rounded once.
static void read_bf16(const Source& s, int64_t row, int64_t from, int64_t to, uint16_t* dst) {
    int64_t flat = row * s.args.k + from;
    const int64_t end = row * s.args.k + to;
    if (s.args.kind == DENSE) {
        memcpy(dst, (const uint16_t*)s.args.dense + flat, (size_t)(end - flat) * 2);
        return;
    }
    while (flat < end) {
        const int64_t block = flat >> s.shift, stop = min64(end, (block + 1) << s.shift);
        span_16<false, true>(s.codes, s.scales[block - s.first], s.args.packed, flat, stop - flat, BF16, dst);
        dst += stop - flat;
        flat = stop;
    }
}

// Forward tile [rows][Tiled::LD] of w[n0 .. n0 + rows, from .. to); PAIR: bf16 pairs along k, an odd end padded with 0.
template <bool PAIR>
static void tile_fwd(const Source& s, int64_t n0, int64_t rows, int64_t from, int64_t to, float* dst) {
    for (int64_t i = 0; i < rows; ++i, dst += Tiled<PAIR>::LD) {
        if (!PAIR) {
            read_f32(s, n0 + i, from, to, dst);
            continue;
        }
        uint16_t* row = (uint16_t*)dst;
        read_bf16(s, n0 + i, from, to, row);
        if ((to - from) & 1) row[to - from] = 0;
    }
}

#ifdef FL_AVX512
// Two rows as pairs, where both have the same blocks and whole vectors.
static void read_two_rows(const Source& s, int64_t n, int64_t k0, int64_t columns, uint32_t* dst) {
    int64_t flat = n * s.args.k + k0;
    const int64_t end = flat + columns, row_blocks = s.args.k >> s.shift;
    while (flat < end) {
        const int64_t block = flat >> s.shift, stop = min64(end, (block + 1) << s.shift);
        const float* scale = s.scales + (block - s.first);
        const uint8_t* packed = s.args.packed + (flat >> 1);
        span_two_rows(s.codes, scale[0], scale[row_blocks], packed, packed + (s.args.k >> 1), stop - flat, dst);
        dst += stop - flat;
        flat = stop;
    }
}
#endif

// Backward tile [n units][stride] of w[n0 .. n1, k0 .. k0 + columns); PAIR: bf16 pairs along n, padded with 0.
template <bool PAIR>
static void tile_bwd(const Source& s, int64_t n0, int64_t n1, int64_t k0, int64_t columns, int64_t stride, float* dst) {
    uint16_t low[FEATURES_BWD], high[FEATURES_BWD];
#ifdef FL_AVX512
    const bool whole = PAIR && s.args.kind != DENSE && s.args.k % s.args.blocksize == 0 && (k0 | columns) % 32 == 0;
#else
    const bool whole = false;
#endif
    for (int64_t n = n0; n < n1; n += 1 + PAIR, dst += stride) {
        if (!PAIR) {
            read_f32(s, n, k0, k0 + columns, dst);
            continue;
        }
#ifdef FL_AVX512
        if (whole && n + 1 < n1) {
            read_two_rows(s, n, k0, columns, (uint32_t*)dst);
            continue;
        }
#endif
        read_bf16(s, n, k0, k0 + columns, low);
        if (n + 1 < n1) read_bf16(s, n + 1, k0, k0 + columns, high);
        else memset(high, 0, sizeof high);
        interleave_16(low, high, columns, (uint32_t*)dst);
    }
    (void)whole;
}

}  // namespace

#endif
