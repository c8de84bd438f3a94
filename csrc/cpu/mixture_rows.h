// What both directions of a mixture of experts share: activation, sums, an expert's matrices, and the parts that read x
// or make the output. A row is a token in one of its slots; sorted by expert, row p is token order[p] / slots.
#ifndef FASTLORA_CPU_MIXTURE_ROWS_H
#define FASTLORA_CPU_MIXTURE_ROWS_H

namespace {

enum {
    BLOCK = 128,                  // columns of one tile
    PARTS = 32,                   // pieces whose sums are kept apart, at most
    ROWS_MIX = 2 * ADAPTER_ROWS,  // rows of one tile
    ROWS_PIECE = 4 * ROWS_MIX,    // rows of one piece where there are no columns to share out
};

// --- the activation --------------------------------------------------------------------------------------------------

// What a vector lacks in some tiers, by way of the compiler's own vectors.
typedef float Lanes __attribute__((vector_size(W * 4)));
typedef uint32_t LaneBits __attribute__((vector_size(W * 4)));
FL_INLINE Lanes lanes_of(vf v) {
    Lanes lanes;
    memcpy(&lanes, &v, sizeof lanes);
    return lanes;
}
FL_INLINE vf vector_of(Lanes lanes) {
    vf v;
    memcpy(&v, &lanes, sizeof v);
    return v;
}
FL_INLINE vf vsub(vf a, vf b) { return vector_of(lanes_of(a) - lanes_of(b)); }
FL_INLINE vf vdiv(vf a, vf b) { return vector_of(lanes_of(a) / lanes_of(b)); }
FL_INLINE vf vclamp(vf v, float low, float high) {  // NaN stays NaN
    const Lanes least = lanes_of(vset1(low)), most = lanes_of(vset1(high));
    Lanes lanes = lanes_of(v);
    lanes = lanes < least ? least : lanes;
    return vector_of(lanes > most ? most : lanes);
}
// 2^n of the n in the last bits of 1.5 2^23 + n; infinity for 128.
FL_INLINE vf vpower(vf shifted) { return vector_of((Lanes)(((LaneBits)lanes_of(shifted) << 23) + (127u << 23))); }

// 1 / (1 + exp(-v)), to a few units of the last place, 0 below -89; NaN stays NaN.
FL_INLINE vf sigmoid(vf v) {
    const vf magic = vset1(12582912.0f), one = vset1(1.0f);
    const vf t = vclamp(vsub(vzero(), v), -87.0f, 89.0f);
    const vf shifted = vfma(t, vset1(1.44269504f), magic), n = vsub(shifted, magic);
    const vf r = vfma(n, vset1(1.42860677e-6f), vfma(n, vset1(-0.693148613f), t));
    vf p = vset1(1.0f / 720);
    p = vfma(p, r, vset1(1.0f / 120));
    p = vfma(p, r, vset1(1.0f / 24));
    p = vfma(p, r, vset1(1.0f / 6));
    p = vfma(p, r, vset1(0.5f));
    p = vfma(p, r, one);
    p = vfma(p, r, one);
    return vdiv(one, vfma(p, vpower(shifted), one));
}

// act(v) = v sigmoid(u(v)) and its derivative; u(v) = v (SiLU) or GELU's tanh form.
struct Acted {
    vf value, slope;
};
template <int64_t ACT>
FL_INLINE Acted act_of(vf v) {
    const vf one = vset1(1.0f);
    if (ACT == ACT_SILU) {
        const vf s = sigmoid(v);
        return Acted{vmul(v, s), vmul(s, vfma(v, vsub(one, s), one))};
    }
    const vf scale = vset1(1.59576912f), square = vmul(v, v);
    const vf s = sigmoid(vmul(vmul(scale, v), vfma(vset1(0.044715f), square, one)));
    const vf inner = vmul(scale, vfma(vset1(3 * 0.044715f), square, one));
    return Acted{vmul(v, s), vmul(s, vfma(vmul(v, inner), vsub(one, s), one))};
}

// gate <- act(gate + base) * (up + base) of whole vectors.
template <int64_t ACT>
static void act_row(float* gate, const float* up, const float* gate_base, const float* up_base, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {
        const vf g = vadd(vload(gate + i), vload(gate_base + i)), u = vadd(vload(up + i), vload(up_base + i));
        vstore(gate + i, vmul(act_of<ACT>(g).value, u));
    }
}

// gate, up <- their derivatives times w, d (what the adapter adds to d of the hidden row) <- the hidden row; returns
// <d + d_base, hidden>.
template <int64_t ACT>
static float act_back_row(float* gate, float* up, float* d, const float* gate_base, const float* up_base,
                          const float* d_base, float w, int64_t count) {
    vf dot = vzero();
    for (int64_t i = 0; i < count; i += W) {
        const vf g = vadd(vload(gate + i), vload(gate_base + i)), u = vadd(vload(up + i), vload(up_base + i));
        const vf through = vadd(vload(d + i), vload(d_base + i)), weighted = vmul(vset1(w), through);
        const Acted acted = act_of<ACT>(g);
        const vf hidden = vmul(acted.value, u);
        dot = vfma(through, hidden, dot);
        vstore(gate + i, vmul(vmul(weighted, u), acted.slope));
        vstore(up + i, vmul(weighted, acted.value));
        vstore(d + i, hidden);
    }
    return vsum(dot);
}

// --- sums ------------------------------------------------------------------------------------------------------------

// sums[rank][BLOCK] += sum over a tile's tokens of h[token][rank] d[token][BLOCK]; rank: a multiple of 4.
static void rank_sums(int64_t rank, int64_t count, const float* d, const float* h, int64_t ldh, int64_t tokens,
                      float* sums) {
    enum { R = 4, T = TILE_VECTORS };
    for (int64_t j = 0; j < count; j += PANEL)
        for (int64_t i = 0; i < rank; i += R) {
            vf acc[R][T];
            FL_UNROLL
            for (int a = 0; a < R; ++a) {
                FL_UNROLL
                for (int b = 0; b < T; ++b) acc[a][b] = vzero();
            }
            const float *row = d + j, *ranks = h + i;
            for (int64_t t = 0; t < tokens; ++t, row += BLOCK, ranks += ldh) {
                vf v[T];
                FL_UNROLL
                for (int b = 0; b < T; ++b) v[b] = vload(row + b * W);
                FL_UNROLL
                for (int a = 0; a < R; ++a) {
                    const vf s = vset1(ranks[a]);
                    FL_UNROLL
                    for (int b = 0; b < T; ++b) acc[a][b] = vfma(v[b], s, acc[a][b]);
                }
            }
            FL_UNROLL
            for (int a = 0; a < R; ++a) {
                float* to = sums + (i + a) * BLOCK + j;
                FL_UNROLL
                for (int b = 0; b < T; ++b) vstore(to + b * W, vadd(vload(to + b * W), acc[a][b]));
            }
        }
}

// --- what both directions share --------------------------------------------------------------------------------------

FL_INLINE const Mixture& mixture_of(const Shared& shared) { return (const Mixture&)shared.args; }

struct MixtureRows {
    const Mixture& call;
    const Args& args;
    Shared& shared;
    const int64_t rank, rows;  // the largest rank, padded; rows that have an expert
    float *narrow, *tile;      // one thread's: 16-bit matrices on their way; [ROWS_MIX][BLOCK]
    float *panels[2], *natural, *matrix_sums[2], *h_tile;

    // One projection's sums of x, or what it gives to dx: its matrices, and its ranks of each sorted row.
    struct Reader {
        const MixtureSide& side;
        float *turned, *ranks;  // every a_e [k][rank]; [rows][rank]
    };

    explicit MixtureRows(Shared& s)
        : call(mixture_of(s)),
          args(s.args),
          shared(s),
          rank(max64(padded_rank(s.args), W)),
          rows(mixture_of(s).offsets[mixture_of(s).experts]) {}

    void carve_common(Arena& arena) {
        narrow = arena.take(call.adapter_dtype == F32 ? 0 : BLOCK * max64(args.r, 1));
        tile = arena.take(ROWS_MIX * BLOCK);
        for (int i = 0; i < 2; ++i) panels[i] = arena.take(BLOCK * rank), matrix_sums[i] = arena.take(BLOCK * rank);
        natural = arena.take(BLOCK * rank);
        h_tile = arena.take(2 * ROWS_MIX * rank);
    }

    static int64_t parts_of(int64_t columns) { return min64(PARTS, ceil_div(columns, BLOCK)); }
    int64_t token(int64_t row) const { return call.order[row] / call.slots; }

    // body(first row, tokens) for each tile of an expert's rows.
    template <class Body>
    void tiles(int64_t e, const Body& body) const {
        for (int64_t p = call.offsets[e]; p < call.offsets[e + 1]; p += ROWS_MIX)
            body(p, min64(ROWS_MIX, call.offsets[e + 1] - p));
    }

    // body(from, count) for each block of columns of a part.
    template <class Body>
    static void blocks(int64_t columns, int64_t part, const Body& body) {
        const int64_t total = ceil_div(columns, BLOCK), parts = parts_of(columns);
        for (int64_t i = total * part / parts; i < total * (part + 1) / parts; ++i)
            body(i * BLOCK, min64(BLOCK, columns - i * BLOCK));
    }

    // Part of a row as fp32, whole vectors, 0 behind its end: where it lies, or in `buffer`.
    const float* row_of(const void* rows_at, int64_t row, int64_t width, int64_t from, int64_t count,
                        float* buffer) const {
        if (args.dtype == F32 && count % W == 0) return (const float*)rows_at + row * width + from;
        to_f32(rows_at, args.dtype, row * width + from, count, buffer);
        for (int64_t i = count; i < round_up(count, W); ++i) buffer[i] = 0;
        return buffer;
    }

    // Rows of the tokens of a tile, [ROWS_MIX][BLOCK].
    void gather(const void* rows_at, int64_t p, int64_t tokens, int64_t width, int64_t from, int64_t count,
                float* tile) const {
        for (int64_t t = 0; t < tokens; ++t)
            to_f32(rows_at, args.dtype, token(p + t) * width + from, count, tile + t * BLOCK);
    }

    // Ask for the part of the tokens' rows that a tile will read: short pieces far apart, which no hardware foresees.
    // Inlined: a function of nothing but prefetches is one that GCC leaves out.
    FL_MEMBER void ask(const void* rows_at, int64_t p, int64_t tokens, int64_t width, int64_t from,
                       int64_t count) const {
        for (int64_t t = 0; t < tokens; ++t) {
            const char* row = (const char*)at(rows_at, args.dtype, token(p + t) * width + from);
            for (int64_t i = 0; i < count * item_size(args.dtype); i += 64) __builtin_prefetch(row + i, 0, 2);
        }
    }

    const float* as_f32(const void* matrix, int64_t from, int64_t count) {
        if (call.adapter_dtype == F32) return (const float*)matrix + from;
        to_f32(matrix, call.adapter_dtype, from, count, narrow);
        return narrow;
    }

    // b_e[n0 .. n0 + count, :] as panels [count / PANEL][r][PANEL].
    void panels_of_b(const MixtureSide& side, int64_t e, int64_t n, int64_t n0, int64_t count, float* to) {
        const float* b = as_f32(side.b, (e * n + n0) * side.r, count * side.r);
        for (int64_t j = 0; j < count; j += PANEL)
            transpose(b + j * side.r, min64(PANEL, count - j), side.r, side.r, to + j * side.r, PANEL);
    }

    // The same as rows [count][rank], padded with 0.
    void rows_of_b(const MixtureSide& side, int64_t e, int64_t n, int64_t n0, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i, to += rank) {
            to_f32(side.b, call.adapter_dtype, (e * n + n0 + i) * side.r, side.r, to);
            for (int64_t j = side.r; j < rank; ++j) to[j] = 0;
        }
    }

    // a_e[:, k0 .. k0 + count] as panels [count / PANEL][r][PANEL].
    void panels_of_a(const MixtureSide& side, int64_t e, int64_t k, int64_t k0, int64_t count, float* to) const {
        for (int64_t j = 0; j < count; j += PANEL) {
            const int64_t here = min64(PANEL, count - j);
            for (int64_t i = 0; i < side.r; ++i, to += PANEL) {
                to_f32(side.a, call.adapter_dtype, (e * side.r + i) * k + k0 + j, here, to);
                for (int64_t l = here; l < PANEL; ++l) to[l] = 0;
            }
        }
    }

    // The same as rows [count][rank], padded with 0.
    void columns_of_a(const MixtureSide& side, int64_t e, int64_t k, int64_t k0, int64_t count, float* to) {
        if (!side.r) memset(to, 0, (size_t)(count * rank) * 4);
        for (int64_t i = 0; i < count && side.r; i += BLOCK) {
            const int64_t here = min64(BLOCK, count - i);
            const float* a = (const float*)side.a + e * side.r * k + k0 + i;
            int64_t ld = k;
            if (call.adapter_dtype != F32) {
                for (int64_t j = 0; j < side.r; ++j)
                    to_f32(side.a, call.adapter_dtype, (e * side.r + j) * k + k0 + i, here, narrow + j * BLOCK);
                a = narrow, ld = BLOCK;
            }
            transpose_padded(a, side.r, ld, rank, 0, here, to + i * rank);
        }
    }

    // tile[tokens][BLOCK] (+)= the tokens' ranks times panels.
    static void expand(int64_t tokens, int64_t count, const float* panels, int64_t r, const float* ranks, int64_t rank,
                       float* tile, bool add) {
        rows_times_tile<false>(tokens, count, panels, r * PANEL, ranks, rank, r, tile, BLOCK, add);
    }

    // parts[part][rows][rank] added up in order, times `factor`, into to[rank] of one row.
    void combine(const float* parts, int64_t count, int64_t row, float factor, float* to) const {
        for (int64_t j = 0; j < rank; j += W) {
            vf sum = vzero();
            for (int64_t part = 0; part < count; ++part) sum = vadd(sum, vload(parts + (part * rows + row) * rank + j));
            vstore(to + j, vmul(sum, vset1(factor)));
        }
    }

    // Row `order[p]` of h [., r], times `factor`, padded with 0.
    void take_h(const MixtureSide& side, int64_t p, float factor, float* to) const {
        const float* h = side.h + call.order[p] * side.r;
        for (int64_t j = 0; j < rank; ++j) to[j] = j < side.r ? factor * h[j] : 0;
    }

    // sums [rank][BLOCK] -> a's gradient rows, or (turned) b's.
    void put(const float* sums, int64_t r, int64_t count, void* out, int64_t at, int64_t stride) {
        for (int64_t j = 0; j < r; ++j) from_f32(sums + j * BLOCK, count, out, call.adapter_dtype, at + j * stride);
    }
    void put_turned(const float* sums, int64_t r, int64_t count, void* out, int64_t at) {
        float* turned = call.adapter_dtype == F32 ? (float*)out + at : narrow;
        transpose(sums, r, count, BLOCK, turned, r);
        if (call.adapter_dtype != F32) from_f32(turned, r * count, out, call.adapter_dtype, at);
    }
    void clear(float* sums) const { memset(sums, 0, (size_t)(rank * BLOCK) * 4); }

    // body(from, to): every row once, shared out.
    template <class Body>
    void all_rows(int64_t* counter, const Body& body) const {
        for (int64_t p; (p = next_piece(counter) * ROWS_PIECE) < rows;) body(p, min64(rows, p + ROWS_PIECE));
    }

    // body(expert, first row, tokens) for every tile once, shared out.
    template <class Body>
    void all_tiles(int64_t* counter, const Body& body) const {
        int64_t before = 0, piece = next_piece(counter);
        for (int64_t e = 0; e < call.experts; ++e)
            tiles(e, [&](int64_t p, int64_t tokens) {
                if (before++ != piece) return;
                body(e, p, tokens);
                piece = next_piece(counter);
            });
    }

    // --- what reads x ---

    template <int COUNT>
    void turn(int64_t* counter, const Reader (&readers)[COUNT]) {
        for (int64_t i; (i = next_piece(counter)) < COUNT * call.experts;) {
            const Reader& reader = readers[i % COUNT];
            columns_of_a(reader.side, i / COUNT, args.k, 0, args.k, reader.turned + i / COUNT * args.k * rank);
        }
    }

    // h of a tile's rows: as it is to the caller; times s, and w where `weigh`, into the readers' ranks.
    template <int COUNT>
    void shrink(int64_t e, int64_t p, int64_t tokens, const Reader (&readers)[COUNT], bool weigh) {
        memset(h_tile, 0, (size_t)(COUNT * ROWS_MIX * rank) * 4);
        for (int64_t k0 = 0; k0 < args.k; k0 += BLOCK) {
            const int64_t count = min64(BLOCK, args.k - k0), at = (e * args.k + k0) * rank;
            gather(args.x, p, tokens, args.k, k0, count, tile);
            for (int i = 0; i < COUNT; ++i)
                rows_times_rank(tokens, rank, readers[i].turned + at, rank, tile, BLOCK, count,
                                h_tile + i * ROWS_MIX * rank, rank);
        }
        for (int i = 0; i < COUNT; ++i)
            for (int64_t t = 0; t < tokens; ++t) {
                const MixtureSide& side = readers[i].side;
                const int64_t row = call.order[p + t];
                const float *h = h_tile + (i * ROWS_MIX + t) * rank, w = weigh ? call.w[row] : 1;
                const float factor = (float)side.scale * w;
                if (side.h) memcpy(side.h + row * side.r, h, (size_t)side.r * 4);
                for (int64_t j = 0; j < rank; ++j) readers[i].ranks[(p + t) * rank + j] = factor * h[j];
            }
    }

    // dx[t] += the rows' ranks times a, and da, of a block of columns.
    template <int COUNT>
    void input_block(int64_t k0, int64_t count, const Reader (&readers)[COUNT]) {
        bool asks = false;
        for (const Reader& reader : readers) asks |= reader.side.da != nullptr;
        for (int64_t e = 0; e < call.experts; ++e) {
            for (int i = 0; i < COUNT; ++i) {
                panels_of_a(readers[i].side, e, args.k, k0, count, panels[i]);
                clear(matrix_sums[i]);
            }
            tiles(e, [&](int64_t p, int64_t tokens) {
                if (asks) gather(args.x, p, tokens, args.k, k0, count, tile);
                for (int i = 0; i < COUNT; ++i)
                    if (readers[i].side.da)
                        rank_sums(rank, count, tile, readers[i].ranks + p * rank, rank, tokens, matrix_sums[i]);
                if (!call.dx) return;
                for (int i = 0; i < COUNT; ++i)
                    expand(tokens, count, panels[i], readers[i].side.r, readers[i].ranks + p * rank, rank, tile, i > 0);
                add_rows(p, tokens, args.k, k0, count, call.dx);
            });
            for (int i = 0; i < COUNT; ++i) {
                const MixtureSide& side = readers[i].side;
                if (side.da) put(matrix_sums[i], side.r, count, side.da, e * side.r * args.k + k0, args.k);
            }
        }
    }

    // --- what makes the output ---

    // A tile's rows added to their tokens' in an fp32 result.
    void add_rows(int64_t p, int64_t tokens, int64_t width, int64_t from, int64_t count, float* result) const {
        for (int64_t t = 0; t < tokens; ++t) {
            float *to = result + token(p + t) * width + from, *row = tile + t * BLOCK;
            for (int64_t i = 0; i < count; ++i) to[i] += row[i];
        }
    }

    // y[t] += the rows' ranks times b^T, of a block of columns.
    void output_block(const MixtureSide& side, const float* ranks, int64_t n0, int64_t count) {
        for (int64_t e = 0; e < call.experts; ++e) {
            if (call.offsets[e] == call.offsets[e + 1]) continue;
            panels_of_b(side, e, call.out, n0, count, panels[0]);
            tiles(e, [&](int64_t p, int64_t tokens) {
                expand(tokens, count, panels[0], side.r, ranks + p * rank, rank, tile, false);
                add_rows(p, tokens, call.out, n0, count, call.y);
            });
        }
    }
    void all_outputs(int64_t* counter, const MixtureSide& side, const float* ranks) {
        for (int64_t i; (i = next_piece(counter)) < ceil_div(call.out, BLOCK);)
            output_block(side, ranks, i * BLOCK, min64(BLOCK, call.out - i * BLOCK));
    }

    // dy b of a part, and db = the sum of ranks^T dy.
    void output_part(const MixtureSide& side, const float* ranks, int64_t part, float* sums) {
        const int64_t n = call.out;
        memset(sums + part * rows * rank, 0, (size_t)(rows * rank) * 4);
        blocks(n, part, [&](int64_t n0, int64_t count) {
            for (int64_t e = 0; e < call.experts; ++e) {
                rows_of_b(side, e, n, n0, count, natural);
                if (side.db) clear(matrix_sums[0]);
                tiles(e, [&](int64_t p, int64_t tokens) {
                    gather(args.dy, p, tokens, n, n0, count, tile);
                    float* to = sums + (part * rows + p) * rank;
                    rows_times_rank(tokens, rank, natural, rank, tile, BLOCK, count, to, rank);
                    if (side.db) rank_sums(rank, count, tile, ranks + p * rank, rank, tokens, matrix_sums[0]);
                });
                if (side.db) put_turned(matrix_sums[0], side.r, count, side.db, (e * n + n0) * side.r);
            }
        });
    }
};

}  // namespace

#endif
