// lora_fwd for a few tokens. The equations are in forward.h; here lanes run along k, and each group of rows of w meets
// all tokens of a group at once, its sums in registers. DoRA with its own dropout multiplies twice as many tokens: x,
// then the dropped x. The adapter's b h is the first term of the same sums.
//
// Packed weights of whole blocks are decoded in registers, where a tier has `Lookup`; x is cut into even and odd
// columns, which is how nibbles come out of their bytes. Dense rows of whole vectors are read where they lie, others by
// way of a small tile.
#ifndef FASTLORA_CPU_FEW_FWD_H
#define FASTLORA_CPU_FEW_FWD_H

namespace {

enum {
    FEATURES_FEW = 24,     // rows of w in one piece of work, a multiple of every R
    CHUNK_BYTES = 16384,   // of one group's x that is used again and again: half a small L1 cache
    DECODE_ROWS = 4,       // rows decoded at once where a tile is needed
    TILE_COLUMNS = 512,
};

// Rows of w that share the loads of x.
template <int T>
struct Together {
    enum { R = T * 4 <= (W == 16 ? 16 : 8) ? 4 : 2 };
};

// fp32 rows, or rows of bf16 pairs, as they lie: a dense weight, a tile, or a of the adapter.
struct PlainRows {
    enum { PAIRS = 1, LATE = 0 };
    typedef int State;
    const float* rows;
    int64_t stride;
    FL_MEMBER int begin(int64_t, int) const { return 0; }
    FL_MEMBER void get(int64_t step, int, int i, int, vf w[2]) const {
        const float* p = rows + i * stride + step * 2 * W;
        w[0] = vload(p);
        w[1] = vload(p + W);
    }
    void next(int64_t count) { rows += count * stride; }
};

// A dense weight that several tokens meet. They are too busy for the loads of the next rows to run ahead of them: those
// are asked for now.
struct AheadRows : PlainRows {
    int64_t ahead;  // floats from here to what is read next
    FL_MEMBER int begin(int64_t step, int i) const {
        const float* p = rows + i * stride + step * 2 * W + ahead;
        __builtin_prefetch(p, 0, 2);
        if (W == 16) __builtin_prefetch(p + W, 0, 2);
        return 0;
    }
};

#ifdef FL_LOOKUP
// Steps of 64 columns, all of one block: a scaled table a row and step. In fp32, vectors of even and of odd columns.
struct PackedSteps {
    enum { PAIRS = BLOCK_64 / (2 * W), LATE = 0 };
    typedef decltype(Lookup().scaled(0)) State;
    const uint8_t* packed;
    const float* scales;
    Lookup codes;
    int64_t bytes, ahead, row_blocks, step0;  // a row; from here to what is read next; blocks a row; steps before
    int shift;                                // log2 of steps a block
    FL_MEMBER State begin(int64_t step, int i) const {
        const uint8_t* p = packed + i * bytes + step * (BLOCK_64 / 2);
        __builtin_prefetch(p + ahead, 0, 2);
        return codes.scaled(scales[i * row_blocks + ((step0 + step) >> shift)]);
    }
    FL_MEMBER void get(int64_t step, int pair, int i, const State& state, vf w[2]) const {
        state.pair(packed + i * bytes + step * (BLOCK_64 / 2) + pair * W, w);
    }
    void next(int64_t count) { packed += count * bytes, scales += count * row_blocks; }
    void use(const float* code) { codes = Lookup(code); }
};

#ifdef FL_BF16
// bf16: 32 even columns, 32 odd ones. The permute reads index bits 0-4: the table lies twice in its register.
struct PackedPairSteps : PackedSteps {
    enum { PAIRS = 1 };
    typedef __m512i State;
    FL_MEMBER __m512i begin(int64_t step, int i) const {
        const vf table = PackedSteps::begin(step, i).table;
        return _mm512_castps_si512(vpairs(table, table));
    }
    FL_MEMBER void get(int64_t step, int, int i, __m512i table, vf w[2]) const {
        const uint8_t* p = packed + i * bytes + step * (BLOCK_64 / 2);
        const __m512i nibbles = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        w[0] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(nibbles, 4), table));
        w[1] = _mm512_castsi512_ps(_mm512_permutexvar_epi16(nibbles, table));
    }
};

// The same for one token, to which a scaled table costs more than its products: the codes in bf16 meet x, and the scale
// their sum (w = absmax code either way, its error that of one rounding to bf16).
struct PackedPairCodes : PackedPairSteps {
    enum { LATE = 1 };
    typedef vf State;
    __m512i table;
    FL_MEMBER vf begin(int64_t step, int i) const {
        __builtin_prefetch(packed + i * bytes + step * (BLOCK_64 / 2) + ahead, 0, 2);
        return vset1(scales[i * row_blocks + ((step0 + step) >> shift)]);
    }
    FL_MEMBER void get(int64_t step, int pair, int i, vf, vf w[2]) const {
        PackedPairSteps::get(step, pair, i, table, w);
    }
    void use(const float* code) { table = _mm512_castps_si512(vpairs(vload(code), vload(code))); }
};
#endif
template <bool PAIR>
struct StepsOf {
    typedef PackedSteps Rows, OneTokens;
};
#ifdef FL_BF16
template <>
struct StepsOf<true> {
    typedef PackedPairSteps Rows;
    typedef PackedPairCodes OneTokens;
};
#endif
#endif

// The adapter's part of some rows: rows of b, and s h of the group's tokens, both padded to whole vectors.
struct Adapter {
    const float *b, *h;
    int64_t rank;  // 0: none
};

// The scale of a step that is `LATE`.
FL_INLINE vf late_scale(const vf& scale) { return scale; }
template <class State>
FL_INLINE vf late_scale(const State&) {
    return vzero();
}

// part[i T + t] += sum of row i times token t, and of their adapter rows. x: vectors of all T tokens side by side.
template <bool PAIR, int R, int T, class Rows>
static void dot(const Rows& rows, int64_t steps, const float* x, const Adapter& adapter, float* part) {
    vf acc[R * T];
    FL_UNROLL
    for (int i = 0; i < R * T; ++i) acc[i] = vzero();
    for (int64_t j = 0; j < adapter.rank; j += W) {
        FL_UNROLL
        for (int i = 0; i < R; ++i) {
            const vf b = vload(adapter.b + i * adapter.rank + j);
            FL_UNROLL
            for (int t = 0; t < T; ++t)
                acc[i * T + t] = vfma(b, vload(adapter.h + t * adapter.rank + j), acc[i * T + t]);
        }
    }
    for (int64_t step = 0; step < steps; ++step) {
        typename Rows::State state[R];
        FL_UNROLL
        for (int i = 0; i < R; ++i) state[i] = rows.begin(step, i);
        FL_UNROLL
        for (int pair = 0; pair < Rows::PAIRS; ++pair, x += 2 * T * W) {
            vf w[R][2];
            FL_UNROLL
            for (int i = 0; i < R; ++i) rows.get(step, pair, i, state[i], w[i]);
            if (Rows::LATE) {
                FL_UNROLL
                for (int i = 0; i < R; ++i)
                    acc[i] = vfma(vdot(vload(x + W), w[i][1], vdot(vload(x), w[i][0], vzero())), late_scale(state[i]),
                                  acc[i]);
                continue;
            }
            FL_UNROLL
            for (int half = 0; half < 2; ++half) {
                FL_UNROLL
                for (int t = 0; t < T; ++t) {
                    const vf v = vload(x + (half * T + t) * W);
                    FL_UNROLL
                    for (int i = 0; i < R; ++i)
                        acc[i * T + t] =
                            PAIR ? vdot(v, w[i][half], acc[i * T + t]) : vfma(v, w[i][half], acc[i * T + t]);
                }
            }
        }
    }
    add_sums<R * T>(acc, part);
}

// The same for one token over dense bf16: rows one after another, as they lie in memory, for which it waits.
static void dot_in_order(const PlainRows& rows, int64_t count, int64_t steps, const float* x, Adapter adapter,
                         float* part) {
    enum { SUMS = 4 };  // hide the latency of a product
    for (int64_t row = 0; row < count; ++row, adapter.b += adapter.rank) {
        const float *p = rows.rows + row * rows.stride, *v = x;
        vf acc[SUMS] = {vzero(), vzero(), vzero(), vzero()};
        for (int64_t j = 0; j < adapter.rank; j += W) acc[0] = vfma(vload(adapter.b + j), vload(adapter.h + j), acc[0]);
        int64_t i = 2 * steps;
        for (; i >= SUMS; i -= SUMS, p += SUMS * W, v += SUMS * W) {
            FL_UNROLL
            for (int j = 0; j < SUMS; ++j) acc[j] = vdot(vload(v + j * W), vload(p + j * W), acc[j]);
        }
        for (; i > 0; --i, p += W, v += W) acc[0] = vdot(vload(v), vload(p), acc[0]);
        part[row] += vsum(vadd(vadd(acc[0], acc[1]), vadd(acc[2], acc[3])));
    }
}

// The same for `count` rows, part [count][T].
template <bool PAIR, int T, class Rows>
static void dot_all(Rows rows, int64_t count, int64_t steps, const float* x, Adapter adapter, float* part) {
    enum { R = Together<T>::R };
    int64_t i = 0;
    for (; i + R <= count; i += R, rows.next(R), adapter.b += R * adapter.rank)
        dot<PAIR, R, T>(rows, steps, x, adapter, part + i * T);
    for (; i < count; ++i, rows.next(1), adapter.b += adapter.rank)
        dot<PAIR, 1, T>(rows, steps, x, adapter, part + i * T);
}

template <bool PAIR>
struct FewForward {
    const Args& args;
    Shared& shared;
    const bool drop, dora, twice, packed, direct;
    const int64_t rank, tokens;  // tokens: rows of x that meet w
    const Groups groups, own;
    const int64_t step, columns, ldx;  // columns of one step; k in whole steps; floats of one token of `base`
    const int64_t chunk;               // columns summed at once
    // shared: x as fp32 (dropped where there is dropout) and x as it meets w, both in groups: a vector of each token of
    // the group, then the next vector of each; s h, padded, of each token
    float *natural, *base, *scaled_h;
    // one thread's
    float *bits, *row, *ordered, *scales, *tile, *b_rows, *part, *out, *column;

    static bool fits(const Args& args) { return args.m >= 1 && args.m * (two_bases(args) ? 2 : 1) <= FEW; }

    FewForward(Shared& s)
        : args(s.args),
          shared(s),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)),
          packed(decoded_in_registers(args)),
          direct(args.kind == DENSE && args.k % (2 * W * (1 + PAIR)) == 0 && (PAIR || args.dtype == F32)),
          rank(round_up(args.r, W)),
          tokens(args.m * (twice ? 2 : 1)),
          groups(tokens),
          own(args.m),
          step(packed ? (int64_t)BLOCK_64 : 2 * W * (1 + PAIR)),
          columns(round_up(args.k, step)),
          ldx(columns / (1 + PAIR)),
          chunk(chunk_of()) {}

    int64_t chunk_of() const {
        const int64_t most = CHUNK_BYTES / (PAIR ? 2 : 4) / ceil_div(tokens, groups.count);
        return min64(columns, round_up(packed || direct ? most : min64(most, TILE_COLUMNS), 4 * BLOCK_64));
    }

    int64_t carve_shared(float* memory) {
        Arena arena(memory);
        natural = arena.take(args.m * round_up(args.k, 2 * W));
        base = arena.take(tokens * ldx);
        scaled_h = arena.take(tokens * rank);
        return arena.used;
    }

    int64_t carve_thread(float* memory) {
        Arena arena(memory);
        bits = arena.take(drop ? ceil_div(args.k, 32) + 1 : 0);
        row = arena.take(ld_natural());
        ordered = arena.take(columns);
        scales = arena.take(args.absmax_codes ? FEATURES_FEW * args.k / args.blocksize + 2 : 0);
        tile = arena.take(DECODE_ROWS * (TILE_COLUMNS + W));
        b_rows = arena.take(rank != args.r ? FEATURES_FEW * rank : 0);
        part = arena.take(tokens * FEATURES_FEW + 16);
        out = arena.take(tokens * FEATURES_FEW);
        column = arena.take(FEATURES_FEW);
        return arena.used;
    }

    int64_t ld_natural() const { return round_up(args.k, 2 * W); }

    // --- x, once ---

    void prepare(int64_t t) {
        memset(row + args.k, 0, (size_t)(ld_natural() - args.k) * 4);
        to_f32(args.x, args.dtype, t * args.k, args.k, row);
        meet(t);
        if (drop) {
            const int64_t bytes = ceil_div(args.k, 8);
            uint8_t* keep = args.mask ? args.mask + t * bytes : (uint8_t*)bits;
            mask_rows(args, t, t + 1, keep);
            keep_f32(row, keep, 0, args.k, row);
            if (twice) meet(args.m + t);
        }
        if (args.r) spread(row, ld_natural(), own, t, natural);
    }

    // The row as token t of `base`: in the order, and to the precision, in which it meets w.
    void meet(int64_t t) {
        if (PAIR) memset((uint16_t*)ordered + args.k, 0, (size_t)(columns - args.k) * 2);
        else memset(ordered + args.k, 0, (size_t)(columns - args.k) * 4);
#ifdef FL_LOOKUP
        if (packed) split<PAIR>(row, args.k, ordered);
#endif
        if (!packed) from_f32(row, args.k, ordered, PAIR ? BF16 : F32, 0);
        spread(ordered, ldx, groups, t, base);
    }

    // `floats` of token t, whole vectors, to its places in its group.
    static void spread(const float* src, int64_t floats, const Groups& groups, int64_t t, float* dst) {
        int64_t group = 0;
        while (groups.first(group + 1) <= t) ++group;
        const int64_t first = groups.first(group), size = groups.size(group);
        dst += first * floats + (t - first) * W;
        for (int64_t i = 0; i < floats; i += W) vstore(dst + i * size, vload(src + i));
    }

    // h of rows j .. j + count of a; K in chunks, so that no sum is long.
    void hidden(int64_t j, int64_t count) {
        float sums[GROUP * DECODE_ROWS + 16];
        const int64_t whole = args.k / (2 * W) * (2 * W);
        for (int64_t group = 0; group < own.count; ++group)
            with_tokens(own.size(group), [&](auto tag) {
                enum { T = decltype(tag)::N };
                const float* x = natural + own.first(group) * ld_natural();
                memset(sums, 0, sizeof sums);
                for (int64_t k = 0; k < whole; k += TILE_COLUMNS)
                    dot_all<false, T>(PlainRows{args.a + j * args.k + k, args.k}, count,
                                      min64(TILE_COLUMNS, whole - k) / (2 * W), x + k * T, Adapter{nullptr, nullptr, 0},
                                      sums);
                for (int64_t i = 0; i < count; ++i)
                    for (int64_t t = 0; t < T; ++t) {
                        float tail = 0;
                        for (int64_t k = whole; k < args.k; ++k)
                            tail += args.a[(j + i) * args.k + k] * x[k / W * T * W + t * W + k % W];
                        put_h(own.first(group) + t, j + i, (sums[i * T + t] + tail) * (float)args.keep_scale);
                    }
            });
    }

    // The second product is multiplied by keep_scale as a whole, so its h must not have it yet.
    void put_h(int64_t t, int64_t j, float h) {
        if (args.h) args.h[t * args.r + j] = h;
        scaled_h[t * rank + j] = (float)args.scale * h;
        if (twice) scaled_h[(args.m + t) * rank + j] = (float)args.scale * h / (float)args.keep_scale;
    }

    // --- rows of w ---

    void rows(int64_t n0, int64_t count) {
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        memset(part, 0, (size_t)(tokens * FEATURES_FEW) * 4);
        const float* b = args.b + n0 * args.r;
        if (rank != args.r) {
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < rank; ++j) b_rows[i * rank + j] = j < args.r ? b[i * args.r + j] : 0;
            b = b_rows;
        }
        for (int64_t k = 0; k < columns; k += chunk) {
            const Adapter adapter{b, scaled_h, k ? 0 : rank};
            const int64_t some = min64(chunk, columns - k);
            if (packed) packed_rows(source, n0, count, k, some, adapter);
            else if (direct && PAIR && tokens == 1)
                dot_in_order(dense_rows(n0, k), count, some / step, base + k / 2, adapter, part);
            else if (direct) dense_tokens(n0, count, k, some, adapter);
            else tile_rows(source, n0, count, k, some, adapter);
        }
        finish(n0, count);
    }

    template <class Rows>
    void all_tokens(const Rows& source, int64_t first, int64_t count, int64_t k, int64_t some, Adapter adapter) {
        for (int64_t group = 0; group < groups.count; ++group) one_group(source, group, first, count, k, some, adapter);
    }

    template <class Rows>
    void one_group(const Rows& source, int64_t group, int64_t first, int64_t count, int64_t k, int64_t some,
                   Adapter adapter) {
        adapter.b += first * adapter.rank;
        with_tokens(groups.size(group), [&](auto tag) {
            enum { T = decltype(tag)::N };
            const int64_t token = groups.first(group);
            adapter.h += token * rank;
            dot_all<PAIR, T>(source, count, some / step, base + token * ldx + k / (1 + PAIR) * T, adapter,
                             part + token * FEATURES_FEW + first * T);
        });
    }

    // The first group waits for memory, the others find the rows in a cache.
    void dense_tokens(int64_t n0, int64_t count, int64_t k, int64_t some, Adapter adapter) {
        AheadRows first;
        static_cast<PlainRows&>(first) = dense_rows(n0, k);
        if (k + some < columns) first.ahead = some / (1 + PAIR);
        else first.ahead = n0 + 2 * count <= args.n ? (count * args.k - k) / (1 + PAIR) : 0;
        one_group(first, 0, 0, count, k, some, adapter);
        for (int64_t group = 1; group < groups.count; ++group)
            one_group(dense_rows(n0, k), group, 0, count, k, some, adapter);
    }

    PlainRows dense_rows(int64_t n0, int64_t k) const {
        return PlainRows{(const float*)at(args.dense, args.dtype, n0 * args.k + k), args.k / (1 + PAIR)};
    }

    void tile_rows(Source& source, int64_t n0, int64_t count, int64_t k, int64_t some, Adapter adapter) {
        enum { LD = TILE_COLUMNS + W };
        const int64_t stop = min64(args.k, k + some), here = stop - k;
        for (int64_t i = 0; i < count; i += DECODE_ROWS) {
            const int64_t together = min64(DECODE_ROWS, count - i);
            for (int64_t row = 0; row < together; ++row) {
                float* dst = tile + row * LD;
                if (PAIR) {
                    read_bf16(source, n0 + i + row, k, stop, (uint16_t*)dst);
                    memset((uint16_t*)dst + here, 0, (size_t)(some - here) * 2);
                } else {
                    read_f32(source, n0 + i + row, k, stop, dst);
                    memset(dst + here, 0, (size_t)(some - here) * 4);
                }
            }
            all_tokens(PlainRows{tile, LD}, i, together, k, some, adapter);
        }
    }

    void packed_rows(Source& source, int64_t n0, int64_t count, int64_t k, int64_t some, Adapter adapter) {
#ifdef FL_LOOKUP
        typedef StepsOf<PAIR && HAS_PAIR> Steps;
        if (tokens > 1) {
            const auto many = steps<typename Steps::Rows>(source, n0, count, k, some);
            return all_tokens(many, 0, count, k, some, adapter);
        }
        dot_all<PAIR, 1>(steps<typename Steps::OneTokens>(source, n0, count, k, some), count, some / step,
                         base + k / (1 + PAIR), adapter, part);
#else
        (void)source, (void)n0, (void)count, (void)k, (void)some, (void)adapter;
#endif
    }

#ifdef FL_LOOKUP
    template <class Rows>
    Rows steps(const Source& source, int64_t n0, int64_t count, int64_t k, int64_t some) const {
        const int64_t bytes = args.k / 2, row_blocks = args.k >> source.shift;
        Rows rows{};
        rows.packed = args.packed + n0 * bytes + k / 2;
        rows.scales = source.scales + (n0 * row_blocks - source.first);
        rows.use(code_of(args));
        rows.bytes = bytes, rows.row_blocks = row_blocks;
        rows.ahead = ahead_of(n0, count, k, some);
        rows.step0 = k / BLOCK_64, rows.shift = source.shift - 6;
        return rows;
    }
#endif

    // How far ahead to prefetch: the same rows' next chunk; where rows are read whole, the rows after these.
    int64_t ahead_of(int64_t n0, int64_t count, int64_t k, int64_t some) const {
        const int64_t bytes = args.k / 2;
        const int64_t rows = max64(4, 8192 / bytes);  // short rows are over before memory has answered
        if (chunk >= columns) return n0 + count + rows <= args.n ? rows * bytes : 0;
        if (k + some < columns) return some / 2;
        return n0 + 2 * count <= args.n ? count * bytes - k / 2 : 0;
    }

    void finish(int64_t n0, int64_t count) {
        for (int64_t group = 0; group < groups.count; ++group) {
            const int64_t first = groups.first(group), size = groups.size(group);
            for (int64_t t = 0; t < size; ++t)
                for (int64_t i = 0; i < count; ++i)
                    out[(first + t) * FEATURES_FEW + i] = part[first * FEATURES_FEW + i * size + t];
        }
        if (dora)
            for (int64_t i = 0; i < count; ++i) column[i] = args.mag[n0 + i] / args.norm[n0 + i];
        for (int64_t t = 0; t < args.m; ++t) {
            const int64_t to = t * args.n + n0;
            float *y = out + t * FEATURES_FEW, *z = twice ? y + args.m * FEATURES_FEW : y;
            if (twice)
                for (int64_t i = 0; i < count; ++i) z[i] *= (float)args.keep_scale;
            if (args.z) from_f32(z, count, args.z, args.dtype, to);
            if (twice)
                for (int64_t i = 0; i < count; ++i) y[i] += (column[i] - 1.0f) * z[i];
            else if (dora)
                for (int64_t i = 0; i < count; ++i) y[i] *= column[i];
            if (args.bias)
                for (int64_t i = 0; i < count; ++i) y[i] += args.bias[n0 + i];
            from_f32(y, count, args.y, args.dtype, to);
        }
    }

    void run() {
        int64_t* counter = shared.counters;
        for (int64_t t; (t = next_piece(counter)) < args.m;) prepare(t);
        team_barrier(args);
        for (int64_t j; (j = next_piece(counter + 1) * DECODE_ROWS) < rank;) {
            const int64_t some = min64(DECODE_ROWS, args.r - j);
            if (some > 0) hidden(j, some);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t i = j + max64(some, 0); i < min64(rank, j + DECODE_ROWS); ++i) scaled_h[t * rank + i] = 0;
        }
        team_barrier(args);
        // Long stretches of the weight to each thread, as the hardware foresees them, and several a thread to share out.
        const int64_t pieces = ceil_div(args.n, FEATURES_FEW), stretch = max64(1, min64(16, pieces / (6 * args.threads)));
        for (int64_t i; (i = next_piece(counter + 2) * stretch) < pieces;)
            for (int64_t j = i; j < min64(pieces, i + stretch); ++j)
                rows(j * FEATURES_FEW, min64(FEATURES_FEW, args.n - j * FEATURES_FEW));
    }
};

}  // namespace

#endif
