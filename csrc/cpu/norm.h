// dora_norm: out_scales[n] = || w[n] + s (b a)[n] ||, a tile of w at a time: the product is added to the decoded tile
// in place, squared and summed. Nothing of size n x k is made.
#ifndef FASTLORA_CPU_NORM_H
#define FASTLORA_CPU_NORM_H

namespace {

struct Norm {
    const Args& args;
    Shared& shared;
    const int64_t stride, features;
    float* a_rows;               // shared, panels [r][PANEL]
    float *tile, *b_rows, *scales;  // one thread's

    // Rows and columns of a tile, which should stay in the L1 cache; rows do not share cache sets.
    enum { ROWS = 4 * TILE_ROWS, COLUMNS = 128, LD = COLUMNS + 16 };

    Norm(Shared& s) : args(s.args), shared(s), stride(round_up(args.k, PANEL)), features(ROWS) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        a_rows = arena.take(args.r * stride);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        tile = arena.take(ROWS * LD);
        b_rows = arena.take(args.r * features);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        return arena.used;
    }

    void rows(int64_t n0, int64_t count) {
        double squares[ROWS] = {};
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        for (int64_t i = 0; i < count * args.r; ++i) b_rows[i] = (float)args.scale * args.b[n0 * args.r + i];
        for (int64_t k0 = 0; k0 < args.k; k0 += COLUMNS) {
            const int64_t depth = min64(COLUMNS, args.k - k0), wide = round_up(depth, PANEL);
            tile_rows(source, n0, count, k0, k0 + depth, LD, tile);
            for (int64_t i = 0; i < count && depth < wide; ++i)
                memset(tile + i * LD + depth, 0, (size_t)(wide - depth) * 4);
            rows_times_tile<false>(count, wide, a_rows + k0 * args.r, args.r * PANEL, b_rows, args.r, args.r, tile,
                                   LD, true);
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
        for (int64_t i; (i = next_piece(counter) * DEPTH) < args.k;)
            put_panels(args.a + i, args.r, min64(DEPTH, args.k - i), args.k, a_rows + i * args.r);
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 1) * features) < args.n;) rows(i, min64(features, args.n - i));
    }
};

}  // namespace

#endif
