// lora_bwd for a few tokens. The equations are in backward.h; here a thread owns columns of dx and walks down the rows
// of w, 32 at a time: the sums of those rows stay in registers and are then added to the thread's part of dx.
//
// Packed weights of whole blocks are decoded in registers (where a tier has `Lookup`) with the plain code table: the
// scale of a block is multiplied into dy instead, once for 64 columns. Even and odd columns stay apart until the end.
// With bf16 dot products two rows of w and two entries of dy make a pair, both rounded to bf16. Dense rows of whole
// vectors are read where they lie, other weights by way of a small tile.
#ifndef FASTLORA_CPU_FEW_BWD_H
#define FASTLORA_CPU_FEW_BWD_H

namespace {

enum {
    ROWS_FEW = 32,        // rows summed in registers
    PIECE_FEW = 1024,     // columns of one piece of work
    TILE_FEW = 128,       // columns decoded at once where a tile is needed
    NFEATURES_FEW = 256,  // rows of one piece of work along n
    SHORT_FEW = 32,       // terms of the innermost sums of g
};

// c[t][0 .. V W) += sum over units of w[unit] dy[t][unit]
template <bool PAIR, int T, int V, class Rows>
FL_INLINE void add_strip(const Rows& rows, int64_t units, const float* dy, float* c, int64_t ldc) {
    vf acc[T][V];
    FL_UNROLL
    for (int t = 0; t < T; ++t) {
        FL_UNROLL
        for (int v = 0; v < V; ++v) acc[t][v] = vzero();
    }
    for (int64_t unit = 0; unit < units; ++unit) {
        vf w[V];
        rows.template load<V>(unit, w);
        FL_UNROLL
        for (int t = 0; t < T; ++t) {
            const vf s = vset1(dy[t * ROWS_FEW + unit]);
            FL_UNROLL
            for (int v = 0; v < V; ++v) acc[t][v] = PAIR ? vdot(w[v], s, acc[t][v]) : vfma(w[v], s, acc[t][v]);
        }
    }
    FL_UNROLL
    for (int t = 0; t < T; ++t) {
        FL_UNROLL
        for (int v = 0; v < V; ++v) vstore(c + t * ldc + v * W, vadd(vload(c + t * ldc + v * W), acc[t][v]));
    }
}

// All strips of `columns`, a multiple of 4 W.
template <bool PAIR, int T, class Rows>
static void add_columns(Rows rows, int64_t units, int64_t columns, const float* dy, float* c, int64_t ldc) {
    enum { V = T * 4 <= (W == 16 ? 16 : 8) ? 4 : 2 };
    for (int64_t k = 0; k < columns; k += V * W, rows.move(V * W)) add_strip<PAIR, T, V>(rows, units, dy, c + k, ldc);
}

template <bool PAIR>
struct FewBackward {
    const Args& args;
    Shared& shared;
    const bool drop, dora, twice, need_dx, need_da, need_g, packed, direct;
    const int64_t rank, tokens;  // tokens: rows of dy that meet w; DoRA with its own dropout has two for each of dy's
    const int64_t pieces_n, width;
    const Groups groups;
    // shared: dy o c [m][n]; what meets w [tokens][n]; b padded to whole vectors; sums of g for each piece along n
    float *scaled, *met, *b_rows, *g_parts;
    // one thread's: g [m][rank]; dx [tokens][width]; x; a tile; scales; dy of one block of rows
    float *g, *c, *x, *a_rows, *tile, *scales, *scales_t, *block, *rows;

    static bool fits(const Args& args) { return args.m >= 1 && args.m * (two_bases(args) ? 2 : 1) <= FEW; }

    FewBackward(Shared& s)
        : args(s.args),
          shared(s),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)),
          need_dx(args.flags & NEED_DX),
          need_da(args.flags & NEED_DA),
          need_g(args.flags & (NEED_DX | NEED_DA)),
          packed(decoded_in_registers(args)),
          direct(args.kind == DENSE && args.k % (4 * W) == 0 && (PAIR || args.dtype == F32)),
          rank(round_up(args.r, W)),
          tokens(args.m * (twice ? 2 : 1)),
          pieces_n(ceil_div(args.n, NFEATURES_FEW)),
          width(piece_width()),
          groups(tokens) {}

    // Narrower pieces where there would be too few to share out; how dx is cut does not change its sums.
    int64_t piece_width() const {
        int64_t columns = PIECE_FEW;
        while (columns > 2 * TILE_FEW && ceil_div(args.k, columns) < 2 * args.threads) columns /= 2;
        return min64(columns, round_up(max64(args.k, 1), TILE_FEW));
    }

    int64_t carve_shared(float* base) {
        Arena arena(base);
        scaled = arena.take(args.m * args.n);
        met = arena.take(twice ? tokens * args.n : 0);
        b_rows = arena.take(need_g && rank != args.r ? args.n * rank : 0);
        g_parts = arena.take(pieces_n * args.m * rank);
        if (!twice) met = scaled;
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        g = arena.take(args.m * rank);
        c = arena.take(tokens * width);
        x = arena.take(args.m * width);
        a_rows = arena.take((args.r + GROUP) * width);
        tile = arena.take(ROWS_FEW * TILE_FEW);
        scales = arena.take(ROWS_FEW * 16);
        scales_t = arena.take(ROWS_FEW * 16);
        block = arena.take(tokens * ROWS_FEW);
        rows = arena.take(GROUP * ROWS_FEW);
        return arena.used;
    }

    // --- along n: dy, g, db, dbias, dmag ---

    void features(int64_t piece) {
        const int64_t n0 = piece * NFEATURES_FEW, count = min64(NFEATURES_FEW, args.n - n0);
        for (int64_t t = 0; t < args.m; ++t) {
            float* dst = scaled + t * args.n + n0;
            to_f32(args.dy, args.dtype, t * args.n + n0, count, dst);
            if (twice) memcpy(met + t * args.n + n0, dst, (size_t)count * 4);
        }
        if (args.flags & NEED_DBIAS) column_sums(n0, count, false, args.dbias);
        if (args.flags & NEED_DMAG) column_sums(n0, count, true, args.dmag);
        if (dora) scale_by_c(n0, count);
        if (need_g) part_of_g(piece, n0, count);
        if (args.flags & NEED_DB) db_rows(n0, count);
    }

    void scale_by_c(int64_t n0, int64_t count) {
        float column[NFEATURES_FEW];
        for (int64_t i = 0; i < count; ++i) column[i] = args.mag[n0 + i] / args.norm[n0 + i];
        for (int64_t t = 0; t < args.m; ++t) {
            float* dy = scaled + t * args.n + n0;
            if (twice) {
                float* less = met + (args.m + t) * args.n + n0;
                for (int64_t i = 0; i < count; ++i) less[i] = dy[i] * (column[i] - 1.0f);
            }
            for (int64_t i = 0; i < count; ++i) dy[i] *= column[i];
        }
    }

    // sum_t dy, or sum_t dy o z / norm, before c is multiplied in
    void column_sums(int64_t n0, int64_t count, bool times_z, float* dst) {
        float total[NFEATURES_FEW] = {}, z[NFEATURES_FEW];
        for (int64_t t = 0; t < args.m; ++t) {
            const float* dy = scaled + t * args.n + n0;
            if (times_z) {
                to_f32(args.z, args.dtype, t * args.n + n0, count, z);
                for (int64_t i = 0; i < count; ++i) total[i] += dy[i] * z[i];
            } else {
                for (int64_t i = 0; i < count; ++i) total[i] += dy[i];
            }
        }
        for (int64_t i = 0; i < count; ++i) dst[n0 + i] = times_z ? total[i] / args.norm[n0 + i] : total[i];
    }

    // g_parts[piece][t][j] = sum over the piece's rows of dyc[t][n] b[n][j], in sums of SHORT_FEW terms.
    void part_of_g(int64_t piece, int64_t n0, int64_t count) {
        const float* b = args.b + n0 * args.r;
        float* part = g_parts + piece * args.m * rank;
        memset(part, 0, (size_t)(args.m * rank) * 4);
        if (rank != args.r) {
            float* dst = b_rows + n0 * rank;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < rank; ++j) dst[i * rank + j] = j < args.r ? b[i * args.r + j] : 0;
            b = dst;
        }
        const Groups own(args.m);
        for (int64_t i = 0; i < own.count; ++i)
            with_tokens(own.size(i), [&](auto tag) {
                enum { T = decltype(tag)::N };
                const float* dy = scaled + own.first(i) * args.n + n0;
                for (int64_t j = 0; j < rank; j += W)
                    for (int64_t n = 0; n < count; n += SHORT_FEW)
                        add_g<T>(b + n * rank + j, min64(SHORT_FEW, count - n), dy + n, part + own.first(i) * rank + j);
            });
    }

    template <int T>
    void add_g(const float* b, int64_t count, const float* dy, float* part) {
        vf acc[T];
        FL_UNROLL
        for (int t = 0; t < T; ++t) acc[t] = vzero();
        for (int64_t i = 0; i < count; ++i) {
            const vf v = vload(b + i * rank);
            FL_UNROLL
            for (int t = 0; t < T; ++t) acc[t] = vfma(v, vset1(dy[t * args.n + i]), acc[t]);
        }
        FL_UNROLL
        for (int t = 0; t < T; ++t) vstore(part + t * rank, vadd(vload(part + t * rank), acc[t]));
    }

    // db[n][j] = s sum_t dyc[t][n] h[t][j]
    void db_rows(int64_t n0, int64_t count) {
        float h[FEW][W];
        const vf s = vset1((float)args.scale);
        for (int64_t j = 0; j < args.r; j += W) {
            const int64_t lanes = min64(W, args.r - j);
            for (int64_t t = 0; t < args.m; ++t)
                for (int64_t i = 0; i < W; ++i) h[t][i] = i < lanes ? args.h[t * args.r + j + i] : 0;
            for (int64_t n = n0; n < n0 + count; n += 4) {
                const int64_t some = min64(4, n0 + count - n);
                float* dst = args.db + n * args.r + j;
                vf acc[4] = {vzero(), vzero(), vzero(), vzero()};
                for (int64_t t = 0; t < args.m; ++t) {
                    const vf v = vload(h[t]);
                    const float* dy = scaled + t * args.n + n;
                    for (int64_t i = 0; i < some; ++i) acc[i] = vfma(v, vset1(dy[i]), acc[i]);
                }
                for (int64_t i = 0; i < some; ++i, dst += args.r) {
                    float row[W];
                    const vf v = vmul(acc[i], s);
                    if (lanes == W) vstore(dst, v);
                    else {
                        vstore(row, v);
                        memcpy(dst, row, (size_t)lanes * 4);
                    }
                }
            }
        }
    }

    // --- along k: dx, da ---

    void sum_g() {
        for (int64_t i = 0; i < args.m * rank; ++i) g[i] = 0;
        for (int64_t piece = 0; piece < pieces_n; ++piece)
            for (int64_t i = 0; i < args.m * rank; ++i) g[i] += g_parts[piece * args.m * rank + i];
    }

    void columns(int64_t index) {
        const int64_t k0 = index * width, count = min64(width, args.k - k0);
        if (need_da) da_columns(k0, count);
        if (!need_dx) return;
        memset(c, 0, (size_t)(tokens * width) * 4);
        Source source(args);
        for (int64_t n0 = 0; n0 < args.n; n0 += ROWS_FEW) {
            const int64_t some = min64(ROWS_FEW, args.n - n0);
            for (int64_t t = 0; t < tokens; ++t) {
                memcpy(block + t * ROWS_FEW, met + t * args.n + n0, (size_t)some * 4);
                memset(block + t * ROWS_FEW + some, 0, (size_t)(ROWS_FEW - some) * 4);
            }
            if (packed) packed_rows(n0, some, k0, count);
            else if (direct) dense_rows(n0, some, k0, count);
            else tile_rows(source, n0, some, k0, count);
        }
        finish_dx(k0, count);
    }

    // dy of tokens first .. first + T for one block of rows, times a scale a row where given; PAIR: as bf16 pairs.
    void units_of(int64_t first, int64_t count, const float* scale) {
        for (int64_t t = 0; t < count; ++t) {
            const float* src = block + (first + t) * ROWS_FEW;
            float* dst = rows + t * ROWS_FEW;
            for (int64_t i = 0; i < ROWS_FEW; i += 2 * W) {
                vf low = vload(src + i), high = vload(src + i + W);
                if (scale) low = vmul(low, vload(scale + i)), high = vmul(high, vload(scale + i + W));
                if (PAIR) vstore(dst + i / 2, vpairs(low, high));
                else vstore(dst + i, low), vstore(dst + i + W, high);
            }
        }
    }

    template <class Rows>
    void add(const Rows& source, int64_t some, int64_t group, int64_t columns, float* dst, int64_t unit = 0) {
        const int64_t units = PAIR ? ceil_div(some, 2) : some;
        with_tokens(groups.size(group), [&](auto tag) {
            float* to = dst + groups.first(group) * width;
            add_columns<PAIR, decltype(tag)::N>(source, units, columns, rows + unit, to, width);
        });
    }

    void dense_rows(int64_t n0, int64_t some, int64_t k0, int64_t count) {
        const int64_t together = tokens > 2 ? (int64_t)ROWS_FEW : 8;  // few streams where memory is all that counts
        const int64_t ahead = n0 + 2 * ROWS_FEW <= args.n ? together * args.k : 0;
        for (int64_t i = 0; i < groups.count; ++i) {
            units_of(groups.first(i), groups.size(i), nullptr);
            for (int64_t row = 0; row < some; row += together) {
                const void* first = at(args.dense, args.dtype, (n0 + row) * args.k + k0);
                const int64_t here = min64(together, some - row);
#ifdef FL_BF16
                if (PAIR) {
                    add(DensePairs{(const uint16_t*)first, args.k, here, ahead}, here, i, count, c, row / 2);
                    continue;
                }
#endif
                add(DenseRows{(const float*)first, args.k, ahead}, here, i, count, c, row);
            }
        }
    }

    void tile_rows(Source& source, int64_t n0, int64_t some, int64_t k0, int64_t count) {
        float buffer[ROWS_FEW * (TILE_FEW / 16 + 3)];
        for (int64_t k = 0; k < count; k += TILE_FEW) {
            const int64_t columns = min64(TILE_FEW, count - k);
            decode_tile(source, n0, some, k0 + k, columns, buffer);
            for (int64_t i = 0; i < groups.count; ++i) {
                units_of(groups.first(i), groups.size(i), nullptr);
                add(TileRows{tile, TILE_FEW}, some, i, round_up(columns, 4 * W), c + k);
            }
        }
    }

    // Scales are taken row by row: a tile has few of each.
    void decode_tile(Source& source, int64_t n0, int64_t some, int64_t k0, int64_t columns, float* buffer) {
        for (int64_t n = n0; n < n0 + some; n += 1 + PAIR) {
            const int64_t stop = min64(n + 1 + PAIR, n0 + some);
            uint16_t halves[2][TILE_FEW];
            for (int64_t row = n; row < stop; ++row) {
                source.use_scales(row * args.k + k0, row * args.k + k0 + columns, buffer);
                if (PAIR) read_bf16(source, row, k0, k0 + columns, halves[row - n]);
                else read_f32(source, row, k0, k0 + columns, tile + (row - n0) * TILE_FEW);
            }
            if (!PAIR) continue;
            if (stop - n < 2) memset(halves[1], 0, sizeof halves[1]);
            interleave_16(halves[0], halves[1], columns, (uint32_t*)tile + (n - n0) / 2 * TILE_FEW);
        }
    }

    void packed_rows(int64_t n0, int64_t some, int64_t k0, int64_t count) {
#ifdef FL_LOOKUP
        const int64_t bytes = args.k / 2;
        const uint8_t* first = args.packed + (n0 * args.k + k0) / 2;
        const int64_t ahead = n0 + 2 * ROWS_FEW <= args.n ? ROWS_FEW * bytes : 0;
        scales_of_rows(n0, some, k0, count);
        for (int64_t k = 0; k < count; k += BLOCK_64) {
            typedef typename PackedOf<PAIR && HAS_PAIR>::Rows Rows;
            const Rows source(first + k / 2, bytes, some, ahead, code_of(args));
            for (int64_t i = 0; i < groups.count; ++i) {
                units_of(groups.first(i), groups.size(i), scales_t + k / BLOCK_64 * ROWS_FEW);
                add(source, some, i, BLOCK_64, c + k);
            }
        }
#else
        (void)n0, (void)some, (void)k0, (void)count;
#endif
    }

#ifdef FL_LOOKUP
    // scales_t[64-column group][row]
    void scales_of_rows(int64_t n0, int64_t some, int64_t k0, int64_t count) {
        const int shift = __builtin_ctzll((unsigned long long)args.blocksize);
        for (int64_t i = 0; i < some; ++i) {
            const int64_t flat = (n0 + i) * args.k + k0, first = flat >> shift, last = (flat + count - 1) >> shift;
            float* dst = scales + i * 16;
            scales_of(args, first, last + 1, dst);
            if (args.blocksize == BLOCK_64) continue;
            for (int64_t group = (count - 1) / BLOCK_64; group >= 0; --group)  // in place: from the last on
                dst[group] = dst[((flat + group * BLOCK_64) >> shift) - first];
        }
        transpose(scales, ROWS_FEW, 16, 16, scales_t, ROWS_FEW);
    }
#endif

    // dx = c1 + keep_scale mask o (c2 + s g a)
    void finish_dx(int64_t k0, int64_t count) {
        const int64_t padded = round_up(count, W), bytes = ceil_div(args.k, 8);
        const Groups own(args.m);
        if (packed) unsplit(count);
        for (int64_t j = 0; j < args.r; ++j) memcpy(a_rows + j * width, args.a + j * args.k + k0, (size_t)count * 4);
        for (int64_t i = 0; i < own.count; ++i)
            with_tokens(own.size(i), [&](auto tag) {
                for (int64_t k = 0; k < padded; k += W) add_adapter<decltype(tag)::N>(own.first(i), k);
            });
        for (int64_t t = 0; t < args.m; ++t) {
            float* y = c + t * width;
            if (drop) {
                float* dropped = x + t * width;
                keep_f32(dropped, args.mask + t * bytes, k0, count, dropped);
                for (int64_t i = 0; i < count; ++i) y[i] += (float)args.keep_scale * dropped[i];
            }
            from_f32(y, count, args.dx, args.dtype, t * args.k + k0);
        }
    }

    // The adapter's part: into c where nothing is dropped, else with the second half of c into x, to be masked.
    template <int T>
    void add_adapter(int64_t first, int64_t k) {
        vf acc[T];
        FL_UNROLL
        for (int t = 0; t < T; ++t) acc[t] = vzero();
        for (int64_t j = 0; j < args.r; ++j) {
            const vf v = vload(a_rows + j * width + k);
            FL_UNROLL
            for (int t = 0; t < T; ++t) acc[t] = vfma(v, vset1(g[(first + t) * rank + j]), acc[t]);
        }
        const vf s = vset1((float)args.scale);
        FL_UNROLL
        for (int t = 0; t < T; ++t) {
            const int64_t token = first + t, at = token * width + k;
            if (!drop) vstore(c + at, vfma(acc[t], s, vload(c + at)));
            else if (!twice) vstore(x + at, vmul(acc[t], s));
            else vstore(x + at, vfma(acc[t], s, vload(c + args.m * width + at)));
        }
    }

    void unsplit(int64_t count) {
#ifdef FL_LOOKUP
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t k = 0; k < count; k += 2 * W) vunsplit(c + t * width + k);
#else
        (void)count;
#endif
    }

    // da[j][k] = s keep_scale sum_t g[t][j] (mask o x)[t][k]
    void da_columns(int64_t k0, int64_t count) {
        const int64_t bytes = ceil_div(args.k, 8);
        const vf factor = vset1((float)args.scale * (float)args.keep_scale);
        for (int64_t t = 0; t < args.m; ++t) {
            to_f32(args.x, args.dtype, t * args.k + k0, count, x + t * width);
            if (drop) keep_f32(x + t * width, args.mask + t * bytes, k0, count, x + t * width);
        }
        for (int64_t j = 0; j < args.r; j += 4) {
            for (int64_t k = 0; k < count; k += W) {
                vf acc[4] = {vzero(), vzero(), vzero(), vzero()};
                for (int64_t t = 0; t < args.m; ++t) {
                    const vf v = vload(x + t * width + k);
                    const float* s = g + t * rank + j;
                    FL_UNROLL
                    for (int i = 0; i < 4; ++i) acc[i] = vfma(v, vset1(s[i]), acc[i]);
                }
                FL_UNROLL
                for (int i = 0; i < 4; ++i) vstore(a_rows + i * width + k, vmul(acc[i], factor));
            }
            for (int64_t i = 0; i < min64(4, args.r - j); ++i)
                memcpy(args.da + (j + i) * args.k + k0, a_rows + i * width, (size_t)count * 4);
        }
    }

    void run() {
        int64_t* counter = shared.counters;
        for (int64_t i; (i = next_piece(counter)) < pieces_n;) features(i);
        if (!need_g) return;
        team_barrier(args);
        sum_g();
        for (int64_t i; (i = next_piece(counter + 1)) * width < args.k;) columns(i);
    }
};

}  // namespace

#endif
