// lora_fwd for a few tokens (AVX-512): the weight is decoded in registers and meets all tokens at once, so each byte of
// it is read once and nothing is written back. Four or three weight rows share the loads of x; the LoRA term is added
// to the same accumulators before they are summed across lanes.
//
// Packed fp32: x is split into even and odd elements, 32 at a time, which is how nibbles come out of their bytes.
// Packed bf16: table lookups give bf16 pairs in natural order, so x is used as it is.
#ifndef FASTLORA_CPU_SKINNY_H
#define FASTLORA_CPU_SKINNY_H

namespace {

enum { FEW_OLD = 8 };
enum Read { PACKED_F32, PACKED_PAIR, DENSE_F32, DENSE_BF16, DENSE_F16, DENSE_PAIR };

FL_INLINE bool is_pair(int read) { return read == PACKED_PAIR || read == DENSE_PAIR; }

// Weights [k, k + 32) (or 64 as pairs) of the row that starts at flat position `row`, as two vectors.
template <int READ>
FL_INLINE void decode(const Source& s, int64_t row, int64_t k, vf out[2]) {
    const int64_t flat = row + k;
    if (READ == DENSE_F32 || READ == DENSE_PAIR) {
        const float* p = READ == DENSE_F32 ? (const float*)s.args.dense + flat : (const float*)s.args.dense + flat / 2;
        out[0] = vload(p);
        out[1] = vload(p + W);
    } else if (READ == DENSE_BF16 || READ == DENSE_F16) {
        const uint16_t* p = (const uint16_t*)s.args.dense + flat;
        out[0] = READ == DENSE_BF16 ? vload_bf16(p) : vload_f16(p);
        out[1] = READ == DENSE_BF16 ? vload_bf16(p + W) : vload_f16(p + W);
    } else {
        const vf table = vmul(s.codes.table, vset1(s.scales[(flat >> s.shift) - s.first]));
        const uint8_t* p = s.args.packed + (flat >> 1);
        if (READ == PACKED_F32) {
            const __m512i v = bytes_of(p);
            out[0] = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table);
            out[1] = _mm512_permutexvar_ps(v, table);
        } else {
            const __m512i low = pair_table(table), high = _mm512_slli_epi32(low, 16);
            out[0] = _mm512_castsi512_ps(pairs_of(bytes_of(p), low, high));
            out[1] = _mm512_castsi512_ps(pairs_of(bytes_of(p + 16), low, high));
        }
    }
}

// out[t * ld + i] = sum_k w[n0 + i, k] x[t, k] + sum_j b[n0 + i, j] h[t, j] for ROWS rows and M tokens.
template <int READ, int ROWS, int M>
static void dot_rows(const Source& s, int64_t n0, const float* x, int64_t stride, const float* b, int64_t r,
                     const float* h, int64_t rank, float* out, int64_t ld) {
    const int64_t k_total = s.args.k, first = n0 * k_total, step = is_pair(READ) ? 64 : 32;
    vf acc[ROWS][M];
    FL_UNROLL
    for (int i = 0; i < ROWS; ++i) {
        FL_UNROLL
        for (int t = 0; t < M; ++t) acc[i][t] = vzero();
    }
    const float* group = x;
    for (int64_t k = 0; k < k_total; k += step, group += 2 * W) {
        vf w[ROWS][2];
        FL_UNROLL
        for (int i = 0; i < ROWS; ++i) decode<READ>(s, first + i * k_total, k, w[i]);
        FL_UNROLL
        for (int half = 0; half < 2; ++half) {
            FL_UNROLL
            for (int t = 0; t < M; ++t) {
                const vf v = vload(group + t * stride + half * W);
                FL_UNROLL
                for (int i = 0; i < ROWS; ++i)
                    acc[i][t] = is_pair(READ) ? vdot(v, w[i][half], acc[i][t]) : vfma(v, w[i][half], acc[i][t]);
            }
        }
    }
    for (int64_t j = 0; j < r; j += W) {
        const __mmask16 some = (__mmask16)(r - j >= W ? 0xffff : (1 << (r - j)) - 1);
        FL_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const vf v = _mm512_maskz_loadu_ps(some, b + (n0 + i) * r + j);
            FL_UNROLL
            for (int t = 0; t < M; ++t) acc[i][t] = vfma(v, vload(h + t * rank + j), acc[i][t]);
        }
    }
    FL_UNROLL
    for (int i = 0; i < ROWS; ++i) {
        FL_UNROLL
        for (int t = 0; t < M; ++t) out[t * ld + i] = vsum(acc[i][t]);
    }
}

struct Skinny {
    const Args& args;
    Shared& shared;
    const int64_t features, rank;
    const int read;
    float *natural, *split, *scaled_h;  // shared: x as fp32, its even/odd split, s h padded to whole vectors
    float *scales, *out;                // one thread's

    static int read_of(const Args& args) {
        const bool pair = HAS_PAIR && args.dtype == BF16;
        if (args.kind != DENSE) return pair ? PACKED_PAIR : PACKED_F32;
        if (args.dtype == F32) return DENSE_F32;
        return args.dtype == F16 ? DENSE_F16 : pair ? DENSE_PAIR : DENSE_BF16;
    }

    // Whether rows are whole groups and whole blocks, and few tokens see no dropout.
    static bool fits(const Args& args) {
        const int64_t group = is_pair(read_of(args)) ? 64 : 32;
        if (args.m > FEW_OLD || args.k % group || (args.flags & DROPOUT)) return false;
        return args.kind == DENSE || (args.k % args.blocksize == 0 && args.blocksize >= group);
    }

    Skinny(Shared& s) : args(s.args), shared(s), features(48), rank(round_up(s.args.r, W)), read(read_of(s.args)) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        natural = arena.take(args.dtype == F32 ? 0 : args.m * args.k);
        split = arena.take(read == PACKED_F32 ? args.m * args.k : 0);
        scaled_h = arena.take(FEW_OLD * rank);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        out = arena.take(FEW_OLD * features);
        return arena.used;
    }

    const float* x_f32() const { return args.dtype == F32 ? (const float*)args.x : natural; }

    void prepare(int64_t t) {
        if (args.dtype != F32) to_f32(args.x, args.dtype, t * args.k, args.k, natural + t * args.k);
        if (read != PACKED_F32) return;
        const float* src = x_f32() + t * args.k;
        float* dst = split + t * args.k;
        for (int64_t k = 0; k < args.k; k += 32)
            for (int64_t i = 0; i < 16; ++i) {
                dst[k + i] = src[k + 2 * i];
                dst[k + 16 + i] = src[k + 2 * i + 1];
            }
    }

    // h[:, j] for all tokens
    void hidden(int64_t j) {
        const float* row = args.a + j * args.k;
        for (int64_t t = 0; t < args.m; ++t) {
            const float* x = x_f32() + t * args.k;
            vf sums[4] = {vzero(), vzero(), vzero(), vzero()};
            int64_t k = 0;
            for (; k + 4 * W <= args.k; k += 4 * W) {
                FL_UNROLL
                for (int i = 0; i < 4; ++i) sums[i] = vfma(vload(row + k + i * W), vload(x + k + i * W), sums[i]);
            }
            for (; k < args.k; k += W) sums[0] = vfma(vload(row + k), vload(x + k), sums[0]);
            const float h = vsum(vadd(vadd(sums[0], sums[1]), vadd(sums[2], sums[3])));
            if (args.h) args.h[t * args.r + j] = h;
            scaled_h[t * rank + j] = (float)args.scale * h;
        }
    }

    template <int READ, int M>
    void tile_of(const Source& s, int64_t n0, int64_t count) {
        enum { ROWS = M <= 2 ? 4 : 2 };
        const float* x = READ == PACKED_F32 ? split : is_pair(READ) ? (const float*)args.x : x_f32();
        const int64_t stride = is_pair(READ) ? args.k / 2 : args.k;
        int64_t i = 0;
        for (; i + ROWS <= count; i += ROWS)
            dot_rows<READ, ROWS, M>(s, n0 + i, x, stride, args.b, args.r, scaled_h, rank, out + i, features);
        for (; i < count; ++i)
            dot_rows<READ, 1, M>(s, n0 + i, x, stride, args.b, args.r, scaled_h, rank, out + i, features);
    }

    template <int READ>
    void tile(const Source& s, int64_t n0, int64_t count) {
        switch (args.m) {
            case 1:
                return tile_of<READ, 1>(s, n0, count);
            case 2:
                return tile_of<READ, 2>(s, n0, count);
            case 3:
                return tile_of<READ, 3>(s, n0, count);
            case 4:
                return tile_of<READ, 4>(s, n0, count);
            case 5:
                return tile_of<READ, 5>(s, n0, count);
            case 6:
                return tile_of<READ, 6>(s, n0, count);
            case 7:
                return tile_of<READ, 7>(s, n0, count);
            default:
                return tile_of<READ, 8>(s, n0, count);
        }
    }

    void rows(int64_t n0, int64_t count) {
        Source s(args);
        s.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        switch (read) {
            case PACKED_F32:
                tile<PACKED_F32>(s, n0, count);
                break;
            case DENSE_F32:
                tile<DENSE_F32>(s, n0, count);
                break;
            case DENSE_F16:
                tile<DENSE_F16>(s, n0, count);
                break;
#ifdef FL_BF16
            case PACKED_PAIR:
                tile<PACKED_PAIR>(s, n0, count);
                break;
            case DENSE_PAIR:
                tile<DENSE_PAIR>(s, n0, count);
                break;
#else
            case DENSE_BF16:
                tile<DENSE_BF16>(s, n0, count);
                break;
#endif
            default:
                break;
        }
        for (int64_t t = 0; t < args.m; ++t) {
            const int64_t to = t * args.n + n0;
            float* y = out + t * features;
            if (args.z) from_f32(y, count, args.z, args.dtype, to);
            if (args.flags & DORA)
                for (int64_t i = 0; i < count; ++i) y[i] *= args.mag[n0 + i] / args.norm[n0 + i];
            if (args.bias)
                for (int64_t i = 0; i < count; ++i) y[i] += args.bias[n0 + i];
            from_f32(y, count, args.y, args.dtype, to);
        }
    }

    void run() {
        int64_t* counter = shared.counters;
        for (int64_t t; (t = next_piece(counter)) < args.m;) prepare(t);
        team_barrier(args);
        for (int64_t j; (j = next_piece(counter + 1)) < rank;) {
            if (j < args.r) hidden(j);
            else
                for (int64_t t = 0; t < args.m; ++t) scaled_h[t * rank + j] = 0;
        }
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 2) * features) < args.n;) rows(i, min64(features, args.n - i));
    }
};

}  // namespace

#endif
