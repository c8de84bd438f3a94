// lora_bwd. With dyc = c o dy for DoRA (dy otherwise) and the norm a constant:
//     g = dyc b     db = s dyc^T h     da = s keep_scale g^T (mask o x)     dbias = sum dy     dmag = sum dy o z / norm
//     dx = dyc w + s keep_scale mask o (g a)
//     DoRA, own drop:  dx = dy w + keep_scale mask o ((dyc - dy) w + s g a)
// dx is cut by columns of w, da by columns of x, db by columns of dy: no two threads add to one number.
#ifndef FASTLORA_CPU_BACKWARD_H
#define FASTLORA_CPU_BACKWARD_H

namespace {

template <bool PAIR>
struct Backward {
    const Args& args;
    Shared& shared;
    const int64_t units, rank, features, tile_units;
    const bool drop, dora, twice, need_dx, need_g;
    // shared; g [m][rank], h_rows [m][rank]
    float *b_rows, *g_rows, *h_rows, *scaled_g, *packed, *packed_drop, *all_scales, *column;
    // one thread's
    float *rows, *units_buffer, *panel, *g_panel, *tile, *c1, *c2, *a_rows, *out, *out2, *lanes, *sums;

    Backward(Shared& s)
        : args(s.args),
          shared(s),
          units(PAIR ? ceil_div(args.n, 2) : args.n),
          rank(padded_rank(args)),
          features(args.m <= MANY ? (int64_t)FEATURES_BWD_FEW : features_of(args.k, FEATURES_BWD, args.threads)),
          tile_units(args.m <= MANY ? (int64_t)UNITS_BWD_FEW : (int64_t)Tiled<PAIR>::UNITS),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)),
          need_dx(args.flags & NEED_DX),
          need_g(args.flags & (NEED_DX | NEED_DA)) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        const int64_t wide = chunk_lanes(args);
        b_rows = arena.take(need_g && rank != args.r ? args.n * rank : 0);
        g_rows = arena.take(need_g ? args.m * rank : 0);
        h_rows = arena.take((args.flags & NEED_DB) && rank != args.r ? args.m * rank : 0);
        scaled_g = arena.take(need_dx ? wide * rank : 0);
        packed = arena.take(need_dx ? wide * units : 0);
        packed_drop = arena.take(need_dx && twice ? wide * units : 0);
        all_scales = arena.take(need_dx && args.absmax_codes ? blocks() : 0);
        column = arena.take(dora ? args.n : 0);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        const int64_t wide = need_dx ? chunk_lanes(args) : 0;
        rows = arena.take(PANEL * DEPTH);
        units_buffer = arena.take(PANEL * DEPTH / 2);
        panel = arena.take(PANEL * DEPTH);
        g_panel = arena.take(rank * PANEL);
        tile = arena.take(need_dx ? tile_units * features : 0);
        c1 = arena.take(wide * features);
        c2 = arena.take(drop ? wide * features : 0);
        a_rows = arena.take((args.r + 1) * features);
        out = arena.take(PANEL * features);
        out2 = arena.take(drop ? PANEL * features : 0);
        lanes = arena.take(DEPTH * LANES);
        sums = arena.take((rank + 3) * LANES);
        return arena.used;
    }

    int64_t blocks() const { return ceil_div(args.n * args.k, args.blocksize); }

    void prepare(int64_t index) {  // pieces of 1024 rows of whatever must be padded, expanded or divided
        const int64_t from = index * 1024;
        if (need_g && rank != args.r) pad_rows(args.b, from, min64(args.n, from + 1024), b_rows);
        if ((args.flags & NEED_DB) && rank != args.r) pad_rows(args.h, from, min64(args.m, from + 1024), h_rows);
        if (need_dx && args.absmax_codes && from < blocks())
            scales_of(args, from, min64(blocks(), from + 1024), all_scales + from);
        if (dora)
            for (int64_t i = from; i < min64(args.n, from + 1024); ++i) column[i] = args.mag[i] / args.norm[i];
    }

    void pad_rows(const float* src, int64_t first, int64_t last, float* dst) {
        for (int64_t i = first; i < last; ++i)
            for (int64_t j = 0; j < rank; ++j) dst[i * rank + j] = j < args.r ? src[i * args.r + j] : 0;
    }

    // Pack one panel of dy and form its g.
    void pack(const Chunk& chunk, int64_t p) {
        const int64_t tokens = chunk.tokens(p), width = chunk.width(p), row0 = chunk.first + p * PANEL;
        const float* b = rank != args.r ? b_rows : args.b;
        memset(g_panel, 0, (size_t)(rank * width) * 4);
        for (int64_t n0 = 0; n0 < args.n; n0 += DEPTH) {
            const int64_t count = min64(DEPTH, args.n - n0), at = p * PANEL * units + (PAIR ? n0 / 2 : n0) * width;
            for (int64_t t = 0; t < tokens; ++t)
                to_f32(args.dy, args.dtype, (row0 + t) * args.n + n0, count, rows + t * DEPTH);
            if (need_dx && twice) {
                put_panel<PAIR>(rows, tokens, count, width, units_buffer, packed + at);
                scale_rows(tokens, count, column + n0, panel, 1.0f);
                put_panel<PAIR>(panel, tokens, count, width, units_buffer, packed_drop + at);
            }
            if (dora) scale_rows(tokens, count, column + n0, rows, 0.0f);
            if (need_dx && !twice) put_panel<PAIR>(rows, tokens, count, width, units_buffer, packed + at);
            to_panel(rows, DEPTH, tokens, count, width, panel);
            adapter_times_panel(panel, width, width, b + n0 * rank, rank, count, g_panel, width, rank);
        }
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < rank; ++j) g_rows[(row0 + t) * rank + j] = g_panel[j * width + t];
        if (need_dx)
            for (int64_t i = 0; i < rank * width; ++i) scaled_g[p * PANEL * rank + i] = g_panel[i] * (float)args.scale;
    }

    void scale_rows(int64_t tokens, int64_t count, const float* c, float* dst, float less) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < count; ++i) dst[t * DEPTH + i] = rows[t * DEPTH + i] * (c[i] - less);
    }

    void dx_tile(const Chunk& chunk, int64_t index) {
        const int64_t k0 = index * features, count = min64(features, args.k - k0);
        const size_t bytes = (size_t)(chunk.panels() * PANEL * features) * 4;
        Source source(args);
        if (args.absmax_codes) source.scales = all_scales;
        memset(c1, 0, bytes);
        if (drop) memset(c2, 0, bytes);
        for (int64_t unit = 0; unit < units; unit += tile_units) {
            const int64_t depth = min64(tile_units, units - unit), n0 = unit * (1 + PAIR);
            tile_bwd<PAIR>(source, n0, min64(args.n, n0 + tile_units * (1 + PAIR)), k0, count, features, tile);
            for (int64_t p = 0; p < chunk.panels(); ++p) {
                const int64_t width = chunk.width(p), at = p * PANEL * units + unit * width, c = p * PANEL * features;
                tile_times_panel<1, PAIR>(packed + at, width, tile, features, depth, c1 + c, count);
                if (twice) tile_times_panel<1, PAIR>(packed_drop + at, width, tile, features, depth, c2 + c, count);
            }
        }
        for (int64_t j = 0; j < args.r; ++j) memcpy(a_rows + j * features, args.a + j * args.k + k0, (size_t)count * 4);
        for (int64_t p = 0; p < chunk.panels(); ++p) {
            float* c = (drop ? c2 : c1) + p * PANEL * features;
            tile_times_panel<1, false>(scaled_g + p * PANEL * rank, chunk.width(p), a_rows, features, args.r, c, count);
            finish_dx(chunk, p, k0, count);
        }
    }

    void finish_dx(const Chunk& chunk, int64_t p, int64_t k0, int64_t count) {
        const int64_t tokens = chunk.tokens(p), width = chunk.width(p), groups = ceil_div(args.k, 8);
        from_panel(c1 + p * PANEL * features, count, width, tokens, out, features);
        if (drop) from_panel(c2 + p * PANEL * features, count, width, tokens, out2, features);
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = chunk.first + p * PANEL + t;
            float *y = out + t * features, *masked = out2 + t * features;
            if (drop) {
                apply_mask(masked, args.mask + row * groups, k0, count, masked);
                for (int64_t i = 0; i < count; ++i) y[i] += (float)args.keep_scale * masked[i];
            }
            from_f32(y, count, args.dx, args.dtype, row * args.k + k0);
        }
    }

    // da[:, k0 .. k0 + LANES)
    void da_piece(int64_t index) {
        const int64_t k0 = index * LANES, count = min64(LANES, args.k - k0), groups = ceil_div(args.k, 8);
        const float factor = (float)args.scale * (float)args.keep_scale;
        memset(sums, 0, (size_t)(rank * LANES) * 4);
        for (int64_t m0 = 0; m0 < args.m; m0 += DEPTH) {
            const int64_t depth = min64(DEPTH, args.m - m0);
            for (int64_t t = 0; t < depth; ++t) {
                float* row = lanes + t * LANES;
                to_f32(args.x, args.dtype, (m0 + t) * args.k + k0, count, row);
                if (drop) apply_mask(row, args.mask + (m0 + t) * groups, k0, count, row);
            }
            for (int64_t j = 0; j < count; j += PANEL)
                adapter_times_panel(lanes + j, LANES, PANEL, g_rows + m0 * rank, rank, depth, sums + j, LANES, rank);
        }
        for (int64_t j = 0; j < args.r; ++j)
            for (int64_t i = 0; i < count; ++i) args.da[j * args.k + k0 + i] = factor * sums[j * LANES + i];
    }

    // db[n0 .. n0 + LANES, :], dbias and dmag of the same columns
    void db_piece(int64_t index) {
        const int64_t n0 = index * LANES, count = min64(LANES, args.n - n0);
        const float* h = rank != args.r ? h_rows : args.h;
        float *bias = sums + rank * LANES, *mag = bias + LANES, *block = mag + LANES;
        memset(sums, 0, (size_t)((rank + 3) * LANES) * 4);
        for (int64_t m0 = 0; m0 < args.m; m0 += DEPTH) {
            const int64_t depth = min64(DEPTH, args.m - m0);
            for (int64_t t = 0; t < depth; ++t)
                to_f32(args.dy, args.dtype, (m0 + t) * args.n + n0, count, lanes + t * LANES);
            if (args.flags & NEED_DB)
                for (int64_t j = 0; j < count; j += PANEL)
                    adapter_times_panel(lanes + j, LANES, PANEL, h + m0 * rank, rank, depth, sums + j, LANES, rank);
            if (args.flags & NEED_DBIAS) add_column_sums(m0, depth, n0, count, false, block, bias);
            if (args.flags & NEED_DMAG) add_column_sums(m0, depth, n0, count, true, block, mag);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t n = n0 + i;
            const float factor = (float)args.scale * (dora ? column[n] : 1.0f);
            if (args.flags & NEED_DB)
                for (int64_t j = 0; j < args.r; ++j) args.db[n * args.r + j] = factor * sums[j * LANES + i];
            if (args.flags & NEED_DBIAS) args.dbias[n] = bias[i];
            if (args.flags & NEED_DMAG) args.dmag[n] = mag[i] / args.norm[n];
        }
    }

    // total += sum over the block's tokens of dy, or of dy o z: a partial sum a block keeps long sums accurate.
    void add_column_sums(int64_t m0, int64_t depth, int64_t n0, int64_t count, bool times_z, float* block,
                         float* total) {
        float z[LANES];
        memset(block, 0, LANES * 4);
        for (int64_t t = 0; t < depth; ++t) {
            const float* dy = lanes + t * LANES;
            if (times_z) {
                to_f32(args.z, args.dtype, (m0 + t) * args.n + n0, count, z);
                for (int64_t i = 0; i < count; ++i) block[i] += dy[i] * z[i];
            } else {
                for (int64_t i = 0; i < count; ++i) block[i] += dy[i];
            }
        }
        for (int64_t i = 0; i < count; ++i) total[i] += block[i];
    }

    void run() {
        int64_t* counter = shared.counters;
        const int64_t most = max64(max64(args.n, args.m), need_dx && args.absmax_codes ? blocks() : 0);
        for (int64_t i; (i = next_piece(counter)) * 1024 < most;) prepare(i);
        ++counter;
        team_barrier(args);
        const int64_t tiles = need_dx ? ceil_div(args.k, features) : 0;
        for (int64_t index = 0; need_g && index < chunks_of(args); ++index, counter += 2) {
            const Chunk chunk = chunk_at(args, index);
            for (int64_t p; (p = next_piece(counter)) < chunk.panels();) pack(chunk, p);
            team_barrier(args);
            for (int64_t i; (i = next_piece(counter + 1)) < tiles;) dx_tile(chunk, i);
            if (index + 1 < chunks_of(args)) team_barrier(args);
        }
        if (args.flags & NEED_DA)
            for (int64_t i; (i = next_piece(counter)) * LANES < args.k;) da_piece(i);
        if (args.flags & (NEED_DB | NEED_DBIAS | NEED_DMAG))
            for (int64_t i; (i = next_piece(counter + 1)) * LANES < args.n;) db_piece(i);
    }
};

}  // namespace

#endif
