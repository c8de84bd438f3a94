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
    const float* factors = nullptr;  // of the rows, if they are to be multiplied; not for dense bf16 pairs
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
    FL_MEMBER float scale(int64_t block, int64_t row) const {
        return factors ? scales[block - first] * factors[row] : scales[block - first];
    }
};

// w[row, from .. to) as fp32, times the row's factor.
static void read_f32(const Source& s, int64_t row, int64_t from, int64_t to, float* dst) {
    int64_t flat = row * s.args.k + from;
    const int64_t end = row * s.args.k + to;
    if (s.args.kind == DENSE) {
        to_f32(s.args.dense, s.args.dtype, flat, end - flat, dst);
        if (s.factors)
            for (int64_t i = 0; i < end - flat; ++i) dst[i] *= s.factors[row];
        return;
    }
    while (flat < end) {
        const int64_t block = flat >> s.shift, stop = min64(end, (block + 1) << s.shift);
        span_f32<false>(s.codes, s.scale(block, row), s.args.packed, flat, stop - flat, dst);
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
        span_16<false, true>(s.codes, s.scale(block, row), s.args.packed, flat, stop - flat, BF16, dst);
        dst += stop - flat;
        flat = stop;
    }
}

// Blocks do not cross the ends of rows, and a row starts on a whole byte of its own.
FL_INLINE bool whole_rows(const Source& s) { return s.args.kind != DENSE && s.args.k % s.args.blocksize == 0; }

// Rows [count][ld] of w[n0 .. n0 + count, from .. to) as they lie: fp32.
static void tile_rows(const Source& s, int64_t n0, int64_t count, int64_t from, int64_t to, int64_t ld, float* dst) {
    for (int64_t i = 0; i < count; ++i) read_f32(s, n0 + i, from, to, dst + i * ld);
}

// Forward panel: units of k [from, to) by `lanes` rows of w from n0 on, [units][width]; PAIR: bf16 pairs along k, an
// odd end padded with 0. Lanes beyond `lanes` hold anything finite. `rows`: scratch of PANEL x (DEPTH + 16) floats.
template <bool PAIR>
static void panel_fwd(const Source& s, int64_t n0, int64_t lanes, int64_t from, int64_t to, int64_t width, float* rows,
                      float* dst) {
#ifdef FL_AVX512
    if (whole_rows(s) && ((from | to) & 7) == 0) {
        for (int64_t i = 0; i < lanes; i += W)
            decode_transposed<PAIR>(s.codes, s.scales - s.first, s.shift, s.args.packed, s.args.k, n0 + i,
                                    min64(W, lanes - i), from, to, dst + i, width);
        return;
    }
#endif
    const int64_t units = PAIR ? (to - from + 1) / 2 : to - from;
    if (s.args.kind == DENSE && (PAIR ? s.args.k % 2 == 0 : s.args.dtype == F32)) {  // 4-byte units where they lie
        const int64_t ld = PAIR ? s.args.k / 2 : s.args.k;
        transpose((const float*)s.args.dense + n0 * ld + from / (1 + PAIR), lanes, units, ld, dst, width);
        return;
    }
    enum { LD = DEPTH + 16 };
    for (int64_t i = 0; i < lanes; ++i) {
        float* row = rows + i * LD;
        if (!PAIR) {
            read_f32(s, n0 + i, from, to, row);
            continue;
        }
        read_bf16(s, n0 + i, from, to, (uint16_t*)row);
        if ((to - from) & 1) ((uint16_t*)row)[to - from] = 0;
    }
    transpose(rows, lanes, units, LD, dst, width);
}

// Backward panel: rows n0 .. n1 of w by columns [k0, k0 + lanes), times the rows' factors, [units][width]; PAIR: bf16
// pairs along n, padded with 0.
template <bool PAIR>
static void panel_bwd(const Source& s, int64_t n0, int64_t n1, int64_t k0, int64_t lanes, int64_t width, float* dst) {
    uint16_t low[PANEL], high[PANEL];
#ifdef FL_AVX512
    if (whole_rows(s) && ((k0 | lanes) & 31) == 0) {
        enum { AHEAD = 16 };  // rows: each is another line, too far apart for the hardware to foresee
        const int64_t bytes = s.args.k >> 1, row_blocks = s.args.k >> s.shift;
        const uint8_t* packed = s.args.packed + n0 * bytes + (k0 >> 1);
        const float* scales = s.scales - s.first + n0 * row_blocks;
        for (; n0 + PAIR < n1; n0 += 1 + PAIR, dst += width) {
            const float one = s.factors ? s.factors[n0] : 1.0f, two = s.factors && PAIR ? s.factors[n0 + 1] : 1.0f;
            for (int64_t j = 0; j < lanes;) {
                const int64_t block = (k0 + j) >> s.shift, count = min64(lanes, ((block + 1) << s.shift) - k0) - j;
                const uint8_t* p = packed + (j >> 1);
                __builtin_prefetch(p + AHEAD * bytes);
                if (PAIR) {
                    __builtin_prefetch(p + (AHEAD + 1) * bytes);
                    span_two_rows(s.codes, scales[block] * one, scales[block + row_blocks] * two, p, p + bytes, count,
                                  (uint32_t*)dst + j);
                } else {
                    span_f32<false>(s.codes, scales[block] * one, p, 0, count, dst + j);
                }
                j += count;
            }
            packed += (1 + PAIR) * bytes;
            scales += (1 + PAIR) * row_blocks;
        }
    }
#endif
    for (int64_t n = n0; n < n1; n += 1 + PAIR, dst += width) {
        if (!PAIR) {
            if (s.args.kind == DENSE)
                for (int64_t i = 0; i < lanes; i += 16)
                    __builtin_prefetch(at(s.args.dense, s.args.dtype, (n + 16) * s.args.k + k0 + i));
            read_f32(s, n, k0, k0 + lanes, dst);
            continue;
        }
        if (s.args.kind == DENSE && n + 1 < n1) {
            const uint16_t* row = (const uint16_t*)s.args.dense + n * s.args.k + k0;
            for (int64_t i = 0; i < lanes; i += 32) {
                __builtin_prefetch(row + 16 * s.args.k + i);
                __builtin_prefetch(row + 17 * s.args.k + i);
            }
            interleave_16(row, row + s.args.k, lanes, (uint32_t*)dst);
            continue;
        }
        read_bf16(s, n, k0, k0 + lanes, low);
        if (n + 1 < n1) read_bf16(s, n + 1, k0, k0 + lanes, high);
        else memset(high, 0, sizeof high);
        interleave_16(low, high, lanes, (uint32_t*)dst);
    }
}

}  // namespace

#endif
