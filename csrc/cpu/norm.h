// dora_norm: out_scales[n] = || w[n] + s (b a)[n] ||, a tile of w at a time: the product is added to the decoded tile
// in place, squared and summed. Nothing of size n x k is made.
#ifndef FASTLORA_CPU_NORM_H
#define FASTLORA_CPU_NORM_H

namespace {

struct Norm {
    const Args& args;
    Shared& shared;
    const int64_t stride, features;
    float* a_rows;               // shared [r][stride]
    float *tile, *b_t, *scales;  // one thread's

    enum { UNITS = Tiled<false>::UNITS, LD = Tiled<false>::LD };

    Norm(Shared& s) : args(s.args), shared(s), stride(round_up(args.k, PANEL)), features(FEATURES_FWD_FEW) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        a_rows = arena.take(args.r * stride);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        tile = arena.take(FEATURES_FWD_FEW * LD);
        b_t = arena.take((args.r + 1) * features);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        return arena.used;
    }

    void rows(int64_t n0, int64_t count) {
        double squares[FEATURES_FWD_FEW] = {};
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < args.r; ++j)
                b_t[j * features + i] = (float)args.scale * args.b[(n0 + i) * args.r + j];
        for (int64_t k0 = 0; k0 < args.k; k0 += UNITS) {
            const int64_t depth = min64(UNITS, args.k - k0), wide = round_up(depth, PANEL);
            tile_fwd<false>(source, n0, count, k0, k0 + depth, tile);
            for (int64_t i = 0; i < count && depth < wide; ++i)
                memset(tile + i * LD + depth, 0, (size_t)(wide - depth) * 4);
            for (int64_t j = 0; j < wide; j += PANEL)
                for (int64_t i = 0; i < count; i += ROWS_T2)
                    micro<ROWS_T2, 2, 1, false>(a_rows + k0 + j, stride, b_t + i, features, args.r, tile + i * LD + j,
                                                LD);
            for (int64_t i = 0; i < count; ++i) {
                vf sum = vzero();
                for (int64_t j = 0; j < wide; j += W) {
                    const vf v = vload(tile + i * LD + j);
                    sum = vfma(v, v, sum);
                }
                squares[i] += vsum(sum);
            }
        }
        for (int64_t i = 0; i < count; ++i) args.out_scales[n0 + i] = (float)__builtin_sqrt(squares[i]);
    }

    void run() {
        int64_t* counter = shared.counters;
        for (int64_t j; (j = next_piece(counter)) < args.r;) {
            memcpy(a_rows + j * stride, args.a + j * args.k, (size_t)args.k * 4);
            memset(a_rows + j * stride + args.k, 0, (size_t)(stride - args.k) * 4);
        }
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 1) * features) < args.n;) rows(i, min64(features, args.n - i));
    }
};

}  // namespace

#endif
