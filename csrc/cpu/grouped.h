// Several adapters in one batch: adds what each row's own adapter contributes to the frozen base's y and dx. Equations:
// fastlora/ops/schema.py. Rows are taken through `order`, sorted by adapter; nothing is copied together.
//
// With one row an adapter this is reading every a and b once, so both are read as they lie, in fp32 or 16 bits. With
// more rows, tiles of tokens share each read. What a row gets never depends on which other rows are in the batch: each
// sum runs over k (or n, or the rank) in one order, whatever the tile. Gradients sum over an adapter's rows in their
// original order.
#ifndef FASTLORA_CPU_GROUPED_H
#define FASTLORA_CPU_GROUPED_H

namespace {

enum {
    RANKS = 8,                     // rows of a that one piece of h takes
    TOKENS_ONCE = W == 16 ? 4 : 2,  // tokens whose h is formed together
    STEP = SHORT * W,              // columns of one short sum of h
    TILE_TOKENS = 16,              // tokens of one tile of y or dx
    HIDDEN_TOKENS = 64,            // tokens of one piece of h
};

FL_INLINE const Grouped& grouped_of(const Shared& shared) { return (const Grouped&)shared.args; }

// Finds which adapter a piece belongs to. A thread's pieces only ascend, and so does the search.
struct Walk {
    const Grouped& call;
    int64_t adapter, before, part;
    explicit Walk(const Grouped& c) : call(c), adapter(0), before(0), part(0) {}
    template <class Parts>
    bool find(int64_t piece, const Parts& parts) {
        for (; adapter < call.groups; ++adapter) {
            const int64_t here = parts(*this);
            if (piece < before + here) {
                part = piece - before;
                return true;
            }
            before += here;
        }
        return false;
    }
    const Member& member() const { return call.members[adapter]; }
    const int64_t* rows() const { return call.order + call.offsets[adapter]; }
    int64_t count() const { return call.offsets[adapter + 1] - call.offsets[adapter]; }
};

template <int64_t DTYPE>
FL_INLINE vf vload_as(const void* p, int64_t i) {
    if (DTYPE == F32) return vload((const float*)p + i);
    return DTYPE == BF16 ? vload_bf16((const uint16_t*)p + i) : vload_f16((const uint16_t*)p + i);
}

// total[i][t] += sum over `steps` vectors of a[i][.] x[t][.], for R rows of a (of stride k from element `at`). The rows
// lie far apart: what is read next, `ahead` elements on, is asked for now.
template <int64_t DTYPE, int R, int T>
static void short_dots(const void* a, int64_t at, int64_t k, const float* const* x, int64_t steps, int64_t ahead,
                       vf* total) {
    vf acc[R][T];
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int t = 0; t < T; ++t) acc[i][t] = vzero();
    }
    for (int64_t d = 0; d < steps * W; d += W) {
        vf v[T];
        FL_UNROLL
        for (int t = 0; t < T; ++t) v[t] = vload(x[t] + d);
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            __builtin_prefetch((const char*)a + (at + i * k + d + ahead) * (DTYPE == F32 ? 4 : 2), 0, 2);
            const vf w = vload_as<DTYPE>(a, at + i * k + d);
            FL_UNROLL
            for (int t = 0; t < T; ++t) acc[i][t] = vfma(w, v[t], acc[i][t]);
        }
    }
    FL_UNROLL
    for (int i = 0; i < R; ++i) {
        FL_UNROLL
        for (int t = 0; t < T; ++t) total[i * T + t] = vadd(total[i * T + t], acc[i][t]);
    }
}

template <int64_t DTYPE, int T>
static void rank_dots(const void* a, int64_t at, int64_t k, int64_t ranks, const float* const* x, int64_t count,
                      int64_t ahead, vf* total, float* rest) {
    enum { R = T == 1 ? RANKS : 4 };
    const int64_t steps = count / W;
    int64_t i = 0;
    for (; i + R <= ranks; i += R) short_dots<DTYPE, R, T>(a, at + i * k, k, x, steps, ahead, total + i * T);
    for (; i < ranks; ++i) short_dots<DTYPE, 1, T>(a, at + i * k, k, x, steps, ahead, total + i * T);
    if (steps * W == count) return;
    for (int64_t j = 0; j < ranks; ++j)
        for (int t = 0; t < T; ++t)
            for (int64_t d = steps * W; d < count; ++d)
                rest[j * T + t] += to_f32_one(a, DTYPE, at + j * k + d) * x[t][d];
}

// Columns [from, from + count) of a row as fp32, the dropped ones 0; `buffer` where they do not lie there already.
FL_INLINE const float* columns_of(const Args& args, const void* rows, int64_t row, int64_t width, int64_t from,
                                  int64_t count, bool drops, float* buffer) {
    if (args.dtype == F32 && !drops) return (const float*)rows + row * width + from;
    to_f32(rows, args.dtype, row * width + from, count, buffer);
    if (drops) apply_mask(buffer, args.mask + row * ceil_div(width, 8), from, count, buffer);
    return buffer;
}

struct GroupedForward {
    const Grouped& call;
    const Args& args;
    Shared& shared;
    int64_t rank;  // the largest
    float *hidden, *narrow, *b_t, *scaled, *tile, *column, *segment;

    explicit GroupedForward(Shared& s) : call(grouped_of(s)), args(s.args), shared(s), rank(s.args.r) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        hidden = args.h ? nullptr : arena.take(args.m * rank);
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        narrow = arena.take(call.adapter_dtype == F32 ? 0 : PANEL * rank);
        b_t = arena.take(COLUMNS * rank);
        scaled = arena.take(TILE_TOKENS * rank);
        tile = arena.take(TILE_TOKENS * COLUMNS);
        column = arena.take(COLUMNS);
        segment = arena.take(max64(COLUMNS, TOKENS_ONCE * STEP));
        return arena.used;
    }
    enum { COLUMNS = 256 };

    float* h_of(int64_t row) const { return (args.h ? args.h : hidden) + row * rank; }

    // h of T rows and some ranks.
    template <int64_t DTYPE, int T>
    void form_h(const Member& member, const int64_t* rows, int64_t first, int64_t ranks) {
        vf total[RANKS * T];
        float rest[RANKS * T] = {};
        for (vf& each : total) each = vzero();
        for (int64_t from = 0; from < args.k; from += STEP) {
            const int64_t count = min64(STEP, args.k - from);
            const float* x[T];
            for (int t = 0; t < T; ++t)
                x[t] = columns_of(args, args.x, rows[t], args.k, from, count, member.drops, segment + t * STEP);
            const bool last = from + STEP >= args.k;  // then the next rows' first columns
            const int64_t ahead = last ? RANKS * args.k - from : STEP;
            rank_dots<DTYPE, T>(member.a, first * args.k + from, args.k, ranks, x, count, ahead, total, rest);
        }
        for (int64_t i = 0; i < ranks; ++i)
            for (int t = 0; t < T; ++t)
                h_of(rows[t])[first + i] = (float)member.keep_scale * (vsum(total[i * T + t]) + rest[i * T + t]);
    }

    template <int64_t DTYPE>
    void hidden_piece(const Walk& walk) {
        const Member& member = walk.member();
        const int64_t blocks = ceil_div(member.r, RANKS), first = walk.part % blocks * RANKS;
        const int64_t ranks = min64(RANKS, member.r - first);
        int64_t i = walk.part / blocks * HIDDEN_TOKENS;
        const int64_t end = min64(walk.count(), i + HIDDEN_TOKENS);
        for (; i + TOKENS_ONCE <= end; i += TOKENS_ONCE)
            form_h<DTYPE, TOKENS_ONCE>(member, walk.rows() + i, first, ranks);
        for (; i < end; ++i) form_h<DTYPE, 1>(member, walk.rows() + i, first, ranks);
    }

    // Ask for what a later piece reads. Inlined: GCC leaves out a function of nothing but prefetches.
    FL_MEMBER void ask(const void* base, int64_t first, int64_t count) const {
        const char* p = (const char*)at(base, call.adapter_dtype, first);
        for (int64_t i = 0; i < count * item_size(call.adapter_dtype); i += 64) __builtin_prefetch(p + i, 0, 2);
    }

    // b[n0 .. n0 + count, :] as panels [COLUMNS / PANEL][r][PANEL].
    void take_b(const Member& member, int64_t n0, int64_t count) {
        for (int64_t j = 0; j < count; j += PANEL) {
            const int64_t here = min64(PANEL, count - j), at = (n0 + j) * member.r;
            const float* b = (const float*)member.b + at;
            ask(member.b, at + COLUMNS * member.r, here * member.r);
            if (call.adapter_dtype != F32) {
                to_f32(member.b, call.adapter_dtype, at, here * member.r, narrow);
                b = narrow;
            }
            transpose(b, here, member.r, member.r, b_t + j * member.r, PANEL);
        }
    }

    void finish(const Member& member, int64_t row, int64_t n0, int64_t count, const float* delta) {
        const int64_t to = row * args.n + n0;
        float* y = args.dtype == F32 ? (float*)args.y + to : segment;
        if (args.dtype != F32) to_f32(args.y, args.dtype, to, count, y);
        if (!member.mag) {
            for (int64_t i = 0; i < count; ++i) y[i] += delta[i];
        } else {
            float z[COLUMNS];
            if (member.drops_base) {
                to_f32(call.late, args.dtype, to, count, z);
                for (int64_t i = 0; i < count; ++i) z[i] = z[i] * (float)member.keep_scale + delta[i];
            } else if (args.bias) {
                for (int64_t i = 0; i < count; ++i) z[i] = y[i] - args.bias[n0 + i] + delta[i];
            } else {
                for (int64_t i = 0; i < count; ++i) z[i] = y[i] + delta[i];
            }
            for (int64_t i = 0; i < count; ++i) y[i] += delta[i] + (column[i] - 1.0f) * z[i];
            if (args.z) from_f32(z, count, args.z, args.dtype, to);
        }
        if (args.dtype != F32) from_f32(y, count, args.y, args.dtype, to);
    }

    // A row alone: b is read once as it lies, without becoming panels. The same sums in the same order.
    bool alone(const Walk& walk, int64_t count) const {
#ifdef FL_RANK_BLOCK
        return walk.count() == 1 && walk.member().r % W == 0 && count % W == 0 && call.adapter_dtype != F16;
#else
        (void)walk, (void)count;
        return false;
#endif
    }
    template <class Number>
    void one_row(const Walk& walk, int64_t n0, int64_t count) {
#ifdef FL_RANK_BLOCK
        const Member& member = walk.member();
        const int64_t row = walk.rows()[0], r = member.r, ahead = COLUMNS * r * (int64_t)sizeof(Number);
        const float* h = h_of(row);
        for (int64_t j = 0; j < r; ++j) scaled[j] = (float)member.scale * h[j];
        const Number* b = (const Number*)member.b + n0 * r;
        for (int64_t i = 0; i < count; i += W, b += W * r) {
            for (int64_t byte = 0; byte < W * r * (int64_t)sizeof(Number); byte += 64)
                __builtin_prefetch((const char*)b + ahead + byte, 0, 2);
            vf sum = vzero();
            for (int64_t j = 0; j < r; j += W) sum = rank_block(b + j, r, scaled + j, sum);
            vstore(tile + i, sum);
        }
        finish(member, row, n0, count, tile);
#else
        (void)walk, (void)n0, (void)count;
#endif
    }

    void output_piece(const Walk& walk) {
        const Member& member = walk.member();
        const int64_t n0 = walk.part * COLUMNS, count = min64(COLUMNS, args.n - n0), r = member.r;
        if (member.mag)
            for (int64_t i = 0; i < count; ++i) column[i] = member.mag[n0 + i] / member.norm[n0 + i];
        if (alone(walk, count))
            return call.adapter_dtype == F32 ? one_row<float>(walk, n0, count) : one_row<uint16_t>(walk, n0, count);
        take_b(member, n0, count);
        for (int64_t first = 0; first < walk.count(); first += TILE_TOKENS) {
            const int64_t tokens = min64(TILE_TOKENS, walk.count() - first);
            const int64_t* rows = walk.rows() + first;
            for (int64_t t = 0; t < tokens; ++t) {
                const float* h = h_of(rows[t]);
                for (int64_t j = 0; j < r; ++j) scaled[t * r + j] = (float)member.scale * h[j];
            }
            rows_times_tile<false>(tokens, count, b_t, r * PANEL, scaled, r, r, tile, COLUMNS, false);
            for (int64_t t = 0; t < tokens; ++t) finish(member, rows[t], n0, count, tile + t * COLUMNS);
        }
    }

    void run() {
        int64_t* counter = shared.counters;
        const auto blocks = [&](const Walk& at) {
            return ceil_div(at.count(), HIDDEN_TOKENS) * ceil_div(at.member().r, RANKS);
        };
        Walk walk(call);
        for (int64_t i; walk.find(i = next_piece(counter), blocks);) {
            if (call.adapter_dtype == F32) hidden_piece<F32>(walk);
            else if (call.adapter_dtype == BF16) hidden_piece<BF16>(walk);
            else hidden_piece<F16>(walk);
        }
        team_barrier(args);
        const auto tiles = [&](const Walk& at) { return at.count() ? ceil_div(args.n, COLUMNS) : 0; };
        Walk again(call);
        for (int64_t i; again.find(i = next_piece(counter + 1), tiles);) output_piece(again);
    }
};

struct GroupedBackward {
    const Grouped& call;
    const Args& args;
    Shared& shared;
    int64_t rank;  // the largest, a multiple of W
    float *g_rows, *wide, *lanes, *sums, *tokens_d, *column, *ranks_of, *panel, *tile;

    explicit GroupedBackward(Shared& s) : call(grouped_of(s)), args(s.args), shared(s), rank(padded_rank(s.args)) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        g_rows = arena.take(args.m * rank);  // s g, by sorted position
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        wide = arena.take(DEPTH * rank);
        lanes = arena.take(LANES * DEPTH);
        sums = arena.take((rank + RANK_ROWS) * LANES);
        tokens_d = arena.take(PIECE * DEPTH);
        column = arena.take(max64(DEPTH, LANES));
        ranks_of = arena.take(DEPTH * rank);
        panel = arena.take((LANES + PANEL) * rank);
        tile = arena.take(TILE_TOKENS * (LANES + PANEL));
        return arena.used;
    }

    // c = mag / norm of some columns, 1 without DoRA.
    void take_column(const Member& member, int64_t n0, int64_t count) {
        for (int64_t i = 0; i < count; ++i) column[i] = member.mag ? member.mag[n0 + i] / member.norm[n0 + i] : 1.0f;
    }

    // g of a few rows: every row of b once.
    void form_g(const Walk& walk) {
        const Member& member = walk.member();
        const int64_t t0 = walk.part * PIECE, tokens = min64(PIECE, walk.count() - t0), r = member.r;
        const int64_t padded = round_up(r, W), start = call.offsets[walk.adapter] + t0;
        const bool direct = call.adapter_dtype == F32 && padded == r;
        float* g = g_rows + start * rank;
        memset(g, 0, (size_t)(tokens * rank) * 4);
        for (int64_t n0 = 0; n0 < args.n; n0 += DEPTH) {
            const int64_t count = min64(DEPTH, args.n - n0);
            const float* b = (const float*)member.b + n0 * r;
            if (!direct) {
                widen(member.b, n0, count, r, padded);
                b = wide;
            }
            if (member.mag) take_column(member, n0, count);
            for (int64_t t = 0; t < tokens; ++t) {
                float* d = tokens_d + t * DEPTH;
                to_f32(args.dy, args.dtype, walk.rows()[t0 + t] * args.n + n0, count, d);
                if (member.mag)
                    for (int64_t i = 0; i < count; ++i) d[i] *= column[i];
            }
            rows_times_rank(tokens, padded, b, padded, tokens_d, DEPTH, count, g, rank);
        }
        for (int64_t i = 0; i < tokens * rank; ++i) g[i] *= (float)member.scale;
    }

    // Rows of b (r numbers each) as fp32 rows of `padded` numbers.
    void widen(const void* b, int64_t n0, int64_t count, int64_t r, int64_t padded) {
        for (int64_t i = 0; i < count; ++i) {
            to_f32(b, call.adapter_dtype, (n0 + i) * r, r, wide + i * padded);
            for (int64_t j = r; j < padded; ++j) wide[i * padded + j] = 0;
        }
    }

    void clear_sums(int64_t r) { memset(sums, 0, (size_t)(round_up(r, RANK_ROWS) * LANES) * 4); }

    // Columns of a row as fp32, in groups of W lanes, for rank_times_lanes: [LANES / W][DEPTH][W].
    void put_lanes(const float* src, int64_t count, int64_t token) {
        float last[W];
        for (int64_t i = 0; i < count; i += W) {
            const float* from = src + i;
            if (i + W > count) {
                memset(last, 0, sizeof(last));
                memcpy(last, from, (size_t)(count - i) * 4);
                from = last;
            }
            vstore(lanes + i * DEPTH + token * W, vload(from));
        }
    }

    // sums[r][LANES] * factor of the lane -> rows [r][stride] (turn: [count][r]) of the adapters' dtype.
    void put_rows(const float* factor, int64_t r, int64_t count, void* out, int64_t at, int64_t stride) {
        for (int64_t j = 0; j < r; ++j) {
            float* row = sums + j * LANES;
            for (int64_t i = 0; i < count; ++i) row[i] *= factor[i];
            if (stride) from_f32(row, count, out, call.adapter_dtype, at + j * stride);
        }
        if (stride) return;
        float* turned = call.adapter_dtype == F32 ? (float*)out + at : lanes;
        transpose(sums, r, count, LANES, turned, r);
        if (call.adapter_dtype != F32) from_f32(turned, r * count, out, call.adapter_dtype, at);
    }

    // da and dx of LANES columns
    void input_piece(const Walk& walk) {
        const Member& member = walk.member();
        const int64_t k0 = walk.part * LANES, count = min64(LANES, args.k - k0), r = member.r;
        const float* g = g_rows + call.offsets[walk.adapter] * rank;
        float buffer[LANES];
        if (member.da) {
            clear_sums(r);
            for (int64_t t0 = 0; t0 < walk.count(); t0 += DEPTH) {
                const int64_t tokens = min64(DEPTH, walk.count() - t0);
                for (int64_t t = 0; t < tokens; ++t)
                    put_lanes(columns_of(args, args.x, walk.rows()[t0 + t], args.k, k0, count, member.drops, buffer),
                              count, t);
                rank_times_lanes(r, count, lanes, g + t0 * rank, rank, tokens, sums);
            }
            for (int64_t i = 0; i < count; ++i) column[i] = (float)member.keep_scale;
            put_rows(column, r, count, member.da, k0, args.k);
        }
        if (args.dx && walk.count()) input_rows(walk, g, k0, count);
    }

    void input_rows(const Walk& walk, const float* g, int64_t k0, int64_t count) {
        enum { STRIDE = LANES + PANEL };
        const Member& member = walk.member();
        const int64_t r = member.r;
        float buffer[LANES];
        take_a(member, k0, count);
        for (int64_t t0 = 0; t0 < walk.count(); t0 += TILE_TOKENS) {
            const int64_t tokens = min64(TILE_TOKENS, walk.count() - t0);
            rows_times_tile<false>(tokens, count, panel, r * PANEL, g + t0 * rank, rank, r, tile, STRIDE, false);
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t row = walk.rows()[t0 + t], to = row * args.k + k0;
                float *delta = tile + t * STRIDE, *dx = args.dtype == F32 ? (float*)args.dx + to : buffer;
                if (args.dtype != F32) to_f32(args.dx, args.dtype, to, count, dx);
                if (member.drops_base) {
                    float late[LANES];
                    to_f32(call.late, args.dtype, to, count, late);
                    for (int64_t i = 0; i < count; ++i) delta[i] += late[i];
                }
                if (member.drops) {
                    apply_mask(delta, args.mask + row * ceil_div(args.k, 8), k0, count, delta);
                    for (int64_t i = 0; i < count; ++i) delta[i] *= (float)member.keep_scale;
                }
                for (int64_t i = 0; i < count; ++i) dx[i] += delta[i];
                if (args.dtype != F32) from_f32(dx, count, args.dx, args.dtype, to);
            }
        }
    }

    // a[:, k0 .. k0 + count] as panels [LANES / PANEL][r][PANEL].
    void take_a(const Member& member, int64_t k0, int64_t count) {
        for (int64_t j = 0; j < count; j += PANEL) {
            const int64_t here = min64(PANEL, count - j);
            float* to = panel + j * member.r;
            for (int64_t i = 0; i < member.r; ++i, to += PANEL) {
                to_f32(member.a, call.adapter_dtype, i * args.k + k0 + j, here, to);
                for (int64_t l = here; l < PANEL; ++l) to[l] = 0;
            }
        }
    }

    // db and dmag of LANES columns
    void output_piece(const Walk& walk) {
        const Member& member = walk.member();
        const int64_t n0 = walk.part * LANES, count = min64(LANES, args.n - n0), r = member.r;
        const int64_t padded = round_up(r, W);
        float buffer[LANES], mag[LANES] = {};
        clear_sums(r);
        for (int64_t t0 = 0; t0 < walk.count(); t0 += DEPTH) {
            const int64_t tokens = min64(DEPTH, walk.count() - t0);
            float block[LANES] = {};
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t row = walk.rows()[t0 + t];
                const float* dy = columns_of(args, args.dy, row, args.n, n0, count, false, buffer);
                if (member.db) {
                    put_lanes(dy, count, t);
                    memcpy(ranks_of + t * padded, args.h + row * args.r, (size_t)r * 4);
                    memset(ranks_of + t * padded + r, 0, (size_t)(padded - r) * 4);
                }
                if (member.dmag) {
                    float z[LANES];
                    to_f32(args.z, args.dtype, row * args.n + n0, count, z);
                    for (int64_t i = 0; i < count; ++i) block[i] += dy[i] * z[i];
                }
            }
            if (member.db) rank_times_lanes(r, count, lanes, ranks_of, padded, tokens, sums);
            for (int64_t i = 0; i < count; ++i) mag[i] += block[i];
        }
        if (member.dmag)
            for (int64_t i = 0; i < count; ++i) member.dmag[n0 + i] = mag[i] / member.norm[n0 + i];
        if (!member.db) return;
        take_column(member, n0, count);
        for (int64_t i = 0; i < count; ++i) column[i] *= (float)member.scale;
        put_rows(column, r, count, member.db, n0 * r, 0);
    }

    void run() {
        int64_t* counter = shared.counters;
        const auto tokens = [&](const Walk& at) { return args.dx || at.member().da ? ceil_div(at.count(), PIECE) : 0; };
        Walk first(call);
        for (int64_t i; first.find(i = next_piece(counter), tokens);) form_g(first);
        team_barrier(args);
        const auto inputs = [&](const Walk& at) {
            return at.member().da || (args.dx && at.count()) ? ceil_div(args.k, LANES) : 0;
        };
        Walk second(call);
        for (int64_t i; second.find(i = next_piece(counter + 1), inputs);) input_piece(second);
        const auto outputs = [&](const Walk& at) {
            return at.member().db || at.member().dmag ? ceil_div(args.n, LANES) : 0;
        };
        Walk third(call);
        for (int64_t i; third.find(i = next_piece(counter + 2), outputs);) output_piece(third);
    }
};

// Keep bits of sorted positions first .. last - 1, each row's by its own adapter; all kept where nothing drops.
static void grouped_mask(const Grouped& call, int64_t first, int64_t last) {
    Args args = call.args;
    const int64_t bytes = ceil_div(args.k, 8);
    for (int64_t e = 0; e < call.groups; ++e) {
        const Member& member = call.members[e];
        args.stream = member.stream;
        args.threshold = member.threshold;
        for (int64_t i = max64(first, call.offsets[e]); i < min64(last, call.offsets[e + 1]); ++i) {
            const int64_t row = call.order[i];
            uint8_t* out = args.mask + row * bytes;
            if (member.threshold) {
                mask_rows(args, row, row + 1, out);
                continue;
            }
            memset(out, 255, (size_t)bytes);
            if (args.k & 7) out[bytes - 1] = (uint8_t)((1u << (args.k & 7)) - 1);
        }
    }
}

}  // namespace

#endif
