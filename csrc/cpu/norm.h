// dora_norm: out_scales[n] = || w[n] + s (b a)[n] ||, a tile of w at a time: the product is added to the decoded tile,
// squared and summed. Nothing of size n x k is made.
//
// Each step is rounded as torch rounds it when it adds s times the product to w and takes torch.linalg.norm of the rows
// (fp32 on a CPU: the product, times s, plus w; eight sums of squares, one after the other, then what is left of a row).
// A model whose norms came from there gets the same ones here, and goes on training on the same losses.
#ifndef FASTLORA_CPU_NORM_H
#define FASTLORA_CPU_NORM_H

namespace {

struct Norm {
    const Args& args;
    Shared& shared;
    const int64_t stride, features;
    float* a_rows;               // shared, panels [r][PANEL]
    float *tile, *product, *scales;  // one thread's

    // Rows and columns of a tile, which should stay in the L1 cache; rows do not share cache sets.
    enum { ROWS = 2 * TILE_ROWS, COLUMNS = 128, LD = COLUMNS + 16, SUMS = 8 };

    Norm(Shared& s) : args(s.args), shared(s), stride(round_up(args.k, PANEL)), features(ROWS) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        a_rows = arena.take(args.r * stride);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        tile = arena.take(ROWS * LD);
        product = arena.take(ROWS * LD);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        return arena.used;
    }

    typedef float Eight __attribute__((vector_size(SUMS * 4), aligned(4), may_alias));

    // sums[i] += v[i]^2, v = w + s product, SUMS columns at a time, of R rows.
    template <int R>
    void add_squares(float* w, const float* v, int64_t count, Eight* sums) const {
        const float s = (float)args.scale;
        Eight held[R];
        FL_UNROLL
        for (int i = 0; i < R; ++i) held[i] = sums[i];
        for (int64_t j = 0; j < count; j += SUMS) {
            FL_UNROLL
            for (int i = 0; i < R; ++i) {
                const Eight sum = *(Eight*)(w + i * LD + j) + s * *(const Eight*)(v + i * LD + j);
                held[i] += sum * sum;
            }
        }
        FL_UNROLL
        for (int i = 0; i < R; ++i) sums[i] = held[i];
    }

    void rows(int64_t n0, int64_t count) {
        Eight sums[ROWS] = {};
        const int64_t whole = args.k / SUMS * SUMS;
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        for (int64_t k0 = 0; k0 < args.k; k0 += COLUMNS) {
            const int64_t depth = min64(COLUMNS, args.k - k0), wide = round_up(depth, PANEL);
            tile_rows(source, n0, count, k0, k0 + depth, LD, tile);
            rows_times_tile<false>(count, wide, a_rows + k0 * args.r, args.r * PANEL, args.b + n0 * args.r, args.r, args.r,
                                   product, LD, false);
            // Rows beyond count are summed with the rest of theirs, and not used.
            for (int64_t i = 0; i < count; i += 4)
                add_squares<4>(tile + i * LD, product + i * LD, min64(depth, whole - k0), sums + i);
        }
        // A last tile that is shorter still holds the columns beyond the last SUMS.
        const int64_t last = args.k > 0 ? (args.k - 1) / COLUMNS * COLUMNS : 0;
        for (int64_t i = 0; i < count; ++i) {
            float sum = sums[i][0];
            for (int64_t lane = 1; lane < SUMS; ++lane) sum += sums[i][lane];
            for (int64_t j = whole - last; j < args.k - last; ++j) {
                const float v = tile[i * LD + j] + (float)args.scale * product[i * LD + j];
                sum += v * v;
            }
            args.out_scales[n0 + i] = __builtin_sqrtf(sum);
        }
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
