// Quantize, nested scales, dequantize, dropout bits. The oracle is fastlora/math/nf4.py and philox.py, bit for bit.
#ifndef FASTLORA_CPU_QUANTIZE_H
#define FASTLORA_CPU_QUANTIZE_H

namespace {

static const float TINY = 1e-38f;  // the smallest divisor

// max|v|; NaN if any is NaN: as integers the magnitudes are ordered, and NaN is above infinity.
static float absmax_of(const float* v, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = (int32_t)(bits_of(v[i]) & 0x7fffffffu);
        most = most < magnitude ? magnitude : most;
    }
    return float_of(most > 0x7f800000 ? 0x7fc00000u : (uint32_t)most);
}

static float inverse_of(float absmax) { return 1.0f / (absmax < TINY ? TINY : absmax); }

// args: x [k] elements of dtype, kind, blocksize, out_bytes, out_scales.
static void quantize(const Args& args, int64_t first_block, int64_t last_block) {
    const Search s(args.kind == FP4);
    enum { AT_ONCE = 4096 };  // elements as fp32: the largest block, or several small ones
    alignas(64) float buffer[AT_ONCE];
    const int64_t together = args.dtype == F32 ? last_block - first_block : AT_ONCE / 4 / args.blocksize + 1;
    for (int64_t some = first_block; some < last_block; some += together) {
        const int64_t stop = min64(last_block, some + together), from = some * args.blocksize;
        const float* v = (const float*)args.x + from;
        if (args.dtype != F32) {
            to_f32(args.x, args.dtype, from, min64(stop * args.blocksize, args.k) - from, buffer);
            v = buffer;
        }
        for (int64_t block = some; block < stop; ++block, v += args.blocksize) {
            const int64_t start = block * args.blocksize, count = min64(args.blocksize, args.k - start);
            const float absmax = absmax_of(v, count);
            args.out_scales[block] = absmax;
            encode_block(s, v, count, inverse_of(absmax), absmax < __builtin_inff(), args.out_bytes + start / 2);
        }
    }
}

// args: x fp32 [k] scales, nested_offset; groups of 256. out_bytes [k], out_scales [groups].
static void quantize_absmax(const Args& args, int64_t first_group, int64_t last_group) {
    const float offset = args.nested_offset[0];
    const MapSearch search;
    for (int64_t group = first_group; group < last_group; ++group) {
        const int64_t start = group * NESTED, count = min64(NESTED, args.k - start);
        const float* src = (const float*)args.x + start;
        float v[NESTED];
        for (int64_t i = 0; i < count; ++i) v[i] = src[i] - offset;
        const float absmax = absmax_of(v, count);
        args.out_scales[group] = absmax;
        encode_scales(search, v, count, inverse_of(absmax), args.out_bytes + start);
    }
}

// Elements [first, last) of the flat weight (args.k elements) to args.y; `first` on a block border.
template <bool STREAM>
static void dequantize_range(const Args& args, int64_t first, int64_t last, const Source& s) {
    for (int64_t flat = first; flat < last;) {
        const int64_t block = flat >> s.shift, stop = min64(last, (block + 1) << s.shift);
        const float scale = s.scales[block - s.first];
        if (args.dtype == F32) span_f32<STREAM>(s.codes, scale, args.packed, flat, stop - flat, (float*)args.y + flat);
        else span_16<STREAM>(s.codes, scale, args.packed, flat, stop - flat, args.dtype, (uint16_t*)args.y + flat);
        flat = stop;
    }
}

static void dequantize(const Args& args, int64_t first, int64_t last) {
    Source s(args);
    float buffer[1024];
    // Past the caches, ordinary stores would read every line of the output before overwriting it.
    const bool stream = args.k * item_size(args.dtype) > (8 << 20) && ((uintptr_t)args.y & 63) == 0;
    const int64_t step = args.blocksize * 1024;
    for (int64_t start = first; start < last; start += step) {
        const int64_t stop = min64(last, start + step), whole = stop & ~(int64_t)31;
        s.use_scales(start, stop, buffer);
        if (stream) {
            dequantize_range<true>(args, start, whole, s);
            dequantize_range<false>(args, whole, stop, s);
            stream_fence();
        } else {
            dequantize_range<false>(args, start, stop, s);
        }
    }
}

// Rows of keep bits: out [last - first][ceil(k / 8)].
static void mask_rows(const Args& args, int64_t first_row, int64_t last_row, uint8_t* out) {
    const int64_t groups = ceil_div(args.k, 8);
    const uint64_t seed = (uint64_t)*args.seed;
    const uint32_t threshold = (uint32_t)args.threshold, stream = (uint32_t)args.stream;
    for (int64_t row = first_row; row < last_row; ++row, out += groups) {
        int64_t start = 0;
        for (; start + KEEP_BYTES <= groups; start += KEEP_BYTES)
            keep_bytes(seed, stream, (uint64_t)row, (uint32_t)start, threshold, out + start);
        if (start < groups) {
            uint8_t rest[KEEP_BYTES];
            keep_bytes(seed, stream, (uint64_t)row, (uint32_t)start, threshold, rest);
            memcpy(out + start, rest, (size_t)(groups - start));
        }
        if (args.k & 7) out[groups - 1] &= (uint8_t)((1u << (args.k & 7)) - 1);  // bits beyond k are 0
    }
}

}  // namespace

#endif
