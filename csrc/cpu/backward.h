// lora_bwd. With dyc = c o dy for DoRA (dy otherwise) and the norm a constant:
//     g = dyc b     db = s dyc^T h     da = s keep_scale g^T (mask o x)     dbias = sum dy     dmag = sum dy o z / norm
//     dx = dyc w + s keep_scale mask o (g a)
//     DoRA, own drop:  dx = dy w + keep_scale mask o ((dyc - dy) w + s g a)
// Where it can, c is multiplied into what dy meets, w and b, so that dy is read as it lies.
// dx is cut by columns of w, da by columns of x, db by columns of dy: no two threads add to one number.
#ifndef FASTLORA_CPU_BACKWARD_H
#define FASTLORA_CPU_BACKWARD_H

namespace {

template <bool PAIR>
struct Backward {
    enum { AHEAD = 8 };  // rows asked for before: each is a stretch of its own, too short for the hardware to foresee
    const Args& args;
    Shared& shared;
    const int64_t units, rank, panels, features, depth;
    const bool drop, dora, twice, on_weight, need_dx, need_g, own_b, direct;  // on_weight: c is multiplied into w
    const int64_t stride;  // of a readable row of dy
    // shared; b_rows [n][rank], g_rows and h_rows [m][rank], scaled_g [tokens][rank], copies of dy and of the other
    // operand of the base [tokens][stride]
    float *b_rows, *g_rows, *h_rows, *scaled_g, *copy, *copy_drop, *all_scales, *column;
    // one thread's
    float *rows, *tile, *c1, *c2, *a_rows, *lanes, *sums;

    Backward(Shared& s)
        : args(s.args),
          shared(s),
          units(PAIR ? ceil_div(args.n, 2) : args.n),
          rank(padded_rank(args)),
          panels(panels_of(args.k, args.threads)),
          features(panels * PANEL),
          depth(depth_of(units)),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)),
          on_weight(dora && !twice && !(PAIR && args.kind == DENSE)),
          need_dx(args.flags & NEED_DX),
          need_g(args.flags & (NEED_DX | NEED_DA)),
          own_b(need_g && (dora || rank != args.r)),
          direct(readable<PAIR>(args.dtype, args.n) && (!dora || twice || on_weight)),
          stride(readable<PAIR>(args.dtype, args.n) ? units : padded_units(units)) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        const int64_t wide = chunk_tokens(args);
        b_rows = arena.take(own_b ? args.n * rank : 0);
        g_rows = arena.take(need_g ? args.m * rank : 0);
        h_rows = arena.take((args.flags & NEED_DB) && rank != args.r ? args.m * rank : 0);
        scaled_g = arena.take(need_dx ? wide * rank : 0);
        copy = arena.take(need_dx && !direct ? wide * stride : 0);
        copy_drop = arena.take(need_dx && twice ? wide * stride : 0);
        all_scales = arena.take(need_dx && args.absmax_codes ? blocks() : 0);
        column = arena.take(dora ? args.n : 0);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        const int64_t wide = need_dx ? chunk_tokens(args) : 0;
        rows = arena.take(2 * PIECE * DEPTH);
        tile = arena.take(need_dx ? panels * depth * PANEL : 0);
        c1 = arena.take(wide * features);
        c2 = arena.take(drop ? wide * features : 0);
        a_rows = arena.take(args.r * features);
        lanes = arena.take(DEPTH * LANES);
        sums = arena.take((rank + 3) * LANES);
        return arena.used;
    }

    int64_t blocks() const { return ceil_div(args.n * args.k, args.blocksize); }

    void prepare(int64_t index) {  // pieces of 1024 rows of whatever must be padded, expanded or divided
        const int64_t from = index * 1024;
        if (dora)
            for (int64_t i = from; i < min64(args.n, from + 1024); ++i) column[i] = args.mag[i] / args.norm[i];
        if (own_b) pad_rows(args.b, from, min64(args.n, from + 1024), dora ? column : nullptr, b_rows);
        if ((args.flags & NEED_DB) && rank != args.r)
            pad_rows(args.h, from, min64(args.m, from + 1024), nullptr, h_rows);
        if (need_dx && args.absmax_codes && from < blocks())
            scales_of(args, from, min64(blocks(), from + 1024), all_scales + from);
    }

    void pad_rows(const float* src, int64_t first, int64_t last, const float* factors, float* dst) {
        for (int64_t i = first; i < last; ++i) {
            const float factor = factors ? factors[i] : 1.0f;
            for (int64_t j = 0; j < rank; ++j) dst[i * rank + j] = j < args.r ? src[i * args.r + j] * factor : 0;
        }
    }

    // Columns [n0, n0 + count) of a token's dy as fp32 in `row`; readable copies of dy or dyc go where they are needed.
    void take_row(int64_t token, int64_t t, int64_t n0, int64_t count, float* row, float* other) {
        const int64_t at = t * stride + (PAIR ? n0 / 2 : n0);
        to_f32(args.dy, args.dtype, token * args.n + n0, count, row);
        if (!need_dx) return;
        const bool times_c = dora && !twice && !on_weight;
        if (!direct && !times_c) put_row<PAIR>(row, count, copy + at);
        if (!twice && !times_c) return;
        for (int64_t i = 0; i < count; ++i) other[i] = row[i] * (column[n0 + i] - (twice ? 1.0f : 0.0f));
        put_row<PAIR>(other, count, (twice ? copy_drop : copy) + at);
    }

    // g of a piece of tokens, and their readable rows.
    void form_g(const Chunk& chunk, int64_t piece) {
        const int64_t t0 = piece * PIECE, tokens = min64(PIECE, chunk.count - t0), row0 = chunk.first + t0;
        const float* b = own_b ? b_rows : args.b;
        float* g = g_rows + row0 * rank;
        memset(g, 0, (size_t)(tokens * rank) * 4);
        for (int64_t n0 = 0; n0 < args.n; n0 += DEPTH) {
            const int64_t count = min64(DEPTH, args.n - n0);
            const float* dy = (const float*)args.dy + row0 * args.n + n0;
            int64_t ld = args.n;
            if (args.dtype != F32 || (need_dx && !direct) || twice || crowded(args.n)) {
                for (int64_t t = 0; t < tokens; ++t)
                    take_row(row0 + t, t0 + t, n0, count, rows + t * DEPTH, rows + (PIECE + t) * DEPTH);
                dy = rows, ld = DEPTH;
            }
            rows_times_rank(tokens, rank, b + n0 * rank, rank, dy, ld, count, g, rank);
        }
        if (need_dx)
            for (int64_t i = 0; i < tokens * rank; ++i) scaled_g[t0 * rank + i] = g[i] * (float)args.scale;
    }

    void dx_tile(const Chunk& chunk, int64_t index) {
        const int64_t k0 = index * features, count = min64(features, args.k - k0);
        const float* dy = direct ? (const float*)args.dy + chunk.first * stride : copy;
        Source source(args);
        if (args.absmax_codes) source.scales = all_scales;
        if (on_weight) source.factors = column;
        if (!units) {  // a layer without outputs
            memset(c1, 0, (size_t)(chunk.count * features) * 4);
            if (drop) memset(c2, 0, (size_t)(chunk.count * features) * 4);
        }
        for (int64_t unit = 0; unit < units; unit += depth) {
            const int64_t steps = min64(depth, units - unit), n0 = unit * (1 + PAIR);
            for (int64_t j = 0; j < count; j += PANEL)
                panel_bwd<PAIR>(source, n0, min64(args.n, n0 + steps * (1 + PAIR)), k0 + j, min64(PANEL, count - j),
                                PANEL, tile + j * depth);
            rows_times_tile<PAIR>(chunk.count, count, tile, depth * PANEL, dy + unit, stride, steps, c1,
                                  features, unit > 0);
            if (twice)
                rows_times_tile<PAIR>(chunk.count, count, tile, depth * PANEL, copy_drop + unit, stride, steps,
                                      c2, features, unit > 0);
        }
        put_panels(args.a + k0, args.r, count, args.k, a_rows);
        if (args.r || (drop && !twice))
            rows_times_tile<false>(chunk.count, count, a_rows, args.r * PANEL, scaled_g, rank, args.r, drop ? c2 : c1,
                                   features, !drop || twice);
        for (int64_t t = 0; t < chunk.count; ++t)
            finish_dx(chunk.first + t, c1 + t * features, c2 + t * features, k0, count);
    }

    void finish_dx(int64_t row, float* dx, float* masked, int64_t k0, int64_t count) {
        if (drop) {
            apply_mask(masked, args.mask + row * ceil_div(args.k, 8), k0, count, masked);
            for (int64_t i = 0; i < count; ++i) dx[i] += (float)args.keep_scale * masked[i];
        }
        from_f32(dx, count, args.dx, args.dtype, row * args.k + k0);
    }

    // `count` numbers of x, dy or z as fp32: where they lie, if they do and whole vectors may be read, or in `buffer`.
    const float* row_at(const void* src, int64_t from, int64_t count, float* buffer) {
        if (args.dtype == F32 && count % W == 0) return (const float*)src + from;
        to_f32(src, args.dtype, from, count, buffer);
        return buffer;
    }

    // Tokens [m0, m0 + depth) by columns [from, from + count) of x or dy in groups of W lanes: [LANES / W][DEPTH][W].
    void take_lanes(const void* src, int64_t columns, int64_t m0, int64_t tokens, int64_t from, int64_t count,
                    const uint8_t* mask) {
        float row[LANES] = {};
        for (int64_t t = 0; t < tokens; ++t) {
            const char* ahead = (const char*)at(src, args.dtype, (m0 + t + AHEAD) * columns + from);
            for (int64_t i = 0; i < count * item_size(args.dtype); i += 64) __builtin_prefetch(ahead + i);
            const float* values = row_at(src, (m0 + t) * columns + from, count, row);
            if (mask) {
                apply_mask(values, mask + (m0 + t) * ceil_div(columns, 8), from, count, row);
                values = row;
            }
            for (int64_t j = 0; j < count; j += W) vstore(lanes + j * DEPTH + t * W, vload(values + j));
        }
    }

    // da[:, k0 .. k0 + LANES)
    void da_piece(int64_t index) {
        const int64_t k0 = index * LANES, count = min64(LANES, args.k - k0);
        const float factor = (float)args.scale * (float)args.keep_scale;
        memset(sums, 0, (size_t)(rank * LANES) * 4);
        for (int64_t m0 = 0; m0 < args.m; m0 += DEPTH) {
            const int64_t tokens = min64(DEPTH, args.m - m0);
            take_lanes(args.x, args.k, m0, tokens, k0, count, drop ? args.mask : nullptr);
            rank_times_lanes(args.r, count, lanes, g_rows + m0 * rank, rank, tokens, sums);
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
            const int64_t tokens = min64(DEPTH, args.m - m0);
            if (args.flags & NEED_DB) {
                take_lanes(args.dy, args.n, m0, tokens, n0, count, nullptr);
                rank_times_lanes(args.r, count, lanes, h + m0 * rank, rank, tokens, sums);
            }
            if (args.flags & NEED_DBIAS) add_column_sums(m0, tokens, n0, count, false, block, bias);
            if (args.flags & NEED_DMAG) add_column_sums(m0, tokens, n0, count, true, block, mag);
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
    void add_column_sums(int64_t m0, int64_t tokens, int64_t n0, int64_t count, bool times_z, float* block,
                         float* total) {
        float dy_buffer[LANES] = {}, z_buffer[LANES] = {};
        memset(block, 0, LANES * 4);
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t from = (m0 + t) * args.n + n0;
            const float* dy = row_at(args.dy, from, count, dy_buffer);
            if (!times_z) {
                for (int64_t i = 0; i < count; i += W) vstore(block + i, vadd(vload(block + i), vload(dy + i)));
                continue;
            }
            const char* ahead = (const char*)at(args.z, args.dtype, from + AHEAD * args.n);
            for (int64_t i = 0; i < count * item_size(args.dtype); i += 64) __builtin_prefetch(ahead + i);
            const float* z = row_at(args.z, from, count, z_buffer);
            for (int64_t i = 0; i < count; i += W)
                vstore(block + i, vfma(vload(dy + i), vload(z + i), vload(block + i)));
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
            for (int64_t i; (i = next_piece(counter)) < chunk.pieces();) form_g(chunk, i);
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
