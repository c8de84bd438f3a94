// A mixture of LoRA experts over a linear or a gated MLP: all that is not a product with a frozen weight. Equations:
// fastlora/ops/experts_fused.py.
//
// An MLP's hidden values [rows, width] never lie in memory: a piece of work is a block of columns for all experts, in
// which the adapters' parts are added to the base in tiles, the activation is taken and what is summed is summed. Sums
// over columns leave a part for each piece, which are added in order. A token's rows are added up by ascending expert.
#ifndef FASTLORA_CPU_MIXTURE_H
#define FASTLORA_CPU_MIXTURE_H

namespace {

// --- one linear -----------------------------------------------------------------------------------------------------

// `gate` is the linear: y[t] += sum over the token's rows of w s h B^T, h = x A^T, which is given out.
struct RoutedForward : MixtureRows {
    float *turned, *ranks;

    explicit RoutedForward(Shared& s) : MixtureRows(s) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        turned = arena.take(call.experts * args.k * rank);
        ranks = arena.take(rows * rank);
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        carve_common(arena);
        return arena.used;
    }
    void run() {
        const Reader readers[] = {{call.gate, turned, ranks}};
        turn(shared.counters, readers);
        team_barrier(args);
        all_tiles(shared.counters + 1,
                  [&](int64_t e, int64_t p, int64_t tokens) { shrink(e, p, tokens, readers, true); });
        team_barrier(args);
        all_outputs(shared.counters + 2, call.gate, ranks);
    }
};

// dw = <s dy B, h>; dx[t] += sum of w s (dy B) A; and every expert's da and db.
struct RoutedBackward : MixtureRows {
    const int64_t parts;
    float *ranks, *sums;

    explicit RoutedBackward(Shared& s) : MixtureRows(s), parts(parts_of(call.out)) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        ranks = arena.take(rows * rank);
        sums = arena.take(parts * rows * rank);
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        carve_common(arena);
        return arena.used;
    }

    // From here on `ranks` are w s dy B.
    void weigh(int64_t p) {
        float* g = ranks + p * rank;
        const int64_t row = call.order[p];
        const float* h = call.gate.h + row * call.gate.r;
        combine(sums, parts, p, (float)call.gate.scale, g);
        float dot = 0;
        for (int64_t j = 0; j < call.gate.r; ++j) dot += g[j] * h[j];
        if (call.dw) call.dw[row] = dot;
        for (int64_t j = 0; j < rank; ++j) g[j] *= call.w[row];
    }

    void run() {
        int64_t* counter = shared.counters;
        const Reader readers[] = {{call.gate, nullptr, ranks}};
        all_rows(counter, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p)
                take_h(call.gate, p, (float)call.gate.scale * call.w[call.order[p]], ranks + p * rank);
        });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 1)) < parts;) output_part(call.gate, ranks, i, sums);
        team_barrier(args);
        all_rows(counter + 2, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) weigh(p);
        });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 3)) < ceil_div(args.k, BLOCK);)
            input_block(i * BLOCK, min64(BLOCK, args.k - i * BLOCK), readers);
    }
};

// --- a gated MLP: forward -------------------------------------------------------------------------------------------

// hidden[t] = sum over the token's rows of w act(c1 + s h1 B1^T) (c3 + s h3 B3^T), h = x A^T; y[t] += sum of
// w s h2 B2^T, h2 = (the row's hidden values) A2^T. All h are given out, unscaled.
struct MixtureForward : MixtureRows {
    const int64_t parts;
    float *gate_t, *up_t, *gate_h, *up_h, *down_h, *sums;               // shared
    float *up_z, *segment;                                 // one thread's

    explicit MixtureForward(Shared& s) : MixtureRows(s), parts(parts_of(s.args.n)) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        gate_t = arena.take(call.experts * args.k * rank);
        up_t = arena.take(call.experts * args.k * rank);
        gate_h = arena.take(rows * rank);
        up_h = arena.take(rows * rank);
        down_h = arena.take(rows * rank);
        sums = arena.take(parts * rows * rank);
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        carve_common(arena);
        up_z = arena.take(ROWS_MIX * BLOCK);
        segment = arena.take(2 * BLOCK);
        return arena.used;
    }

    template <int64_t ACT>
    void hidden_block(int64_t part, int64_t n0, int64_t count) {
        const int64_t n = args.n, whole = round_up(count, W);
        for (int64_t t = 0; t < args.m; ++t) memset(call.hidden + t * n + n0, 0, (size_t)count * 4);
        for (int64_t e = 0; e < call.experts; ++e) {
            if (call.offsets[e] == call.offsets[e + 1]) continue;
            panels_of_b(call.gate, e, n, n0, count, panels[0]);
            panels_of_b(call.up, e, n, n0, count, panels[1]);
            columns_of_a(call.down, e, n, n0, count, natural);
            tiles(e, [&](int64_t p, int64_t tokens) {
                ask(call.gate_base, p, tokens, n, n0, count);
                ask(call.up_base, p, tokens, n, n0, count);
                expand(tokens, count, panels[0], call.gate.r, gate_h + p * rank, rank, tile, false);
                expand(tokens, count, panels[1], call.up.r, up_h + p * rank, rank, up_z, false);
                for (int64_t t = 0; t < tokens; ++t) {
                    const int64_t row = token(p + t);
                    const float w = call.w[call.order[p + t]];
                    float *gate = tile + t * BLOCK, *to = call.hidden + row * n + n0;
                    act_row<ACT>(gate, up_z + t * BLOCK, row_of(call.gate_base, row, n, n0, count, segment),
                                 row_of(call.up_base, row, n, n0, count, segment + BLOCK), whole);
                    for (int64_t i = 0; i < count; ++i) to[i] += w * gate[i];
                }
                rows_times_rank(tokens, rank, natural, rank, tile, BLOCK, count, sums + (part * rows + p) * rank, rank);
            });
        }
    }

    void hidden_part(int64_t part) {
        memset(sums + part * rows * rank, 0, (size_t)(rows * rank) * 4);
        blocks(args.n, part, [&](int64_t n0, int64_t count) {
            if (call.act == ACT_SILU) hidden_block<ACT_SILU>(part, n0, count);
            else hidden_block<ACT_GELU_TANH>(part, n0, count);
        });
    }

    void run() {
        int64_t* counter = shared.counters;
        const Reader readers[] = {{call.gate, gate_t, gate_h}, {call.up, up_t, up_h}};
        turn(counter, readers);
        team_barrier(args);
        all_tiles(counter + 1, [&](int64_t e, int64_t p, int64_t tokens) { shrink(e, p, tokens, readers, false); });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 2)) < parts;) hidden_part(i);
        team_barrier(args);
        all_rows(counter + 3, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) {
                float* h = down_h + p * rank;
                const int64_t row = call.order[p];
                combine(sums, parts, p, 1.0f, h);
                if (call.down.h) memcpy(call.down.h + row * call.down.r, h, (size_t)call.down.r * 4);
                for (int64_t j = 0; j < rank; ++j) h[j] *= (float)call.down.scale * call.w[row];
            }
        });
        team_barrier(args);
        all_outputs(counter + 4, call.down, down_h);
    }
};

// --- a gated MLP: backward ------------------------------------------------------------------------------------------

// With D = d_hidden[t] + s (dy[t] B2) A2, a row's: dw = <D, hidden>; d_up = w D act(z1), d_gate = w D z3 act'(z1), each
// summed over a token's rows; dx[t] += sum of s (d_gate B1) A1 + s (d_up B3) A3; and every expert's da and db.
struct MixtureBackward : MixtureRows {
    const int64_t parts, out_parts;
    float *gate_h, *up_h, *down_h, *down_g, *weighted_g, *gate_g, *up_g;  // shared, [rows][rank]
    float *sums, *up_sums, *dots;                                         // by part
    float *up_natural, *down_a, *down_da, *up_z, *d, *segment;            // one thread's

    explicit MixtureBackward(Shared& s) : MixtureRows(s), parts(parts_of(s.args.n)), out_parts(parts_of(call.out)) {}
    int64_t carve_shared(float* base) {
        Arena arena(base);
        float** const mine[] = {&gate_h, &up_h, &down_h, &down_g, &weighted_g, &gate_g, &up_g};
        for (float** each : mine) *each = arena.take(rows * rank);
        sums = arena.take(max64(parts, out_parts) * rows * rank);
        up_sums = arena.take(parts * rows * rank);
        dots = arena.take(parts * rows);
        return arena.used;
    }
    int64_t carve_thread(float* base) {
        Arena arena(base);
        carve_common(arena);
        float** const matrices[] = {&up_natural, &down_a, &down_da};
        for (float** each : matrices) *each = arena.take(BLOCK * rank);
        up_z = arena.take(ROWS_MIX * BLOCK);
        d = arena.take(ROWS_MIX * BLOCK);
        segment = arena.take(3 * BLOCK);
        return arena.used;
    }

    template <int64_t ACT>
    void rows_back(int64_t part, int64_t n0, int64_t count, int64_t p, int64_t tokens) {
        const int64_t n = args.n, whole = round_up(count, W);
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t row = token(p + t);
            float *gate = tile + t * BLOCK, *up = up_z + t * BLOCK, *through = d + t * BLOCK;
            for (int64_t i = count; i < whole; ++i) gate[i] = up[i] = through[i] = 0;
            const float* gate_base = row_of(call.gate_base, row, n, n0, count, segment);
            const float* up_base = row_of(call.up_base, row, n, n0, count, segment + BLOCK);
            const float* d_base = row_of(call.d_hidden, row, n, n0, count, segment + 2 * BLOCK);
            dots[part * rows + p + t] += act_back_row<ACT>(gate, up, through, gate_base, up_base, d_base,
                                                           call.w[call.order[p + t]], whole);
            float *d_gate = call.d_gate + row * n + n0, *d_up = call.d_up + row * n + n0;
            for (int64_t i = 0; i < count; ++i) d_gate[i] += gate[i];
            for (int64_t i = 0; i < count; ++i) d_up[i] += up[i];
        }
    }

    template <int64_t ACT>
    void hidden_tile(int64_t part, int64_t n0, int64_t count, int64_t p, int64_t tokens) {
        const int64_t at = p * rank;
        const void* const bases[] = {call.gate_base, call.up_base, call.d_hidden};
        for (const void* each : bases) ask(each, p, tokens, args.n, n0, count);
        expand(tokens, count, panels[0], call.gate.r, gate_h + at, rank, tile, false);
        expand(tokens, count, panels[1], call.up.r, up_h + at, rank, up_z, false);
        expand(tokens, count, down_a, call.down.r, down_g + at, rank, d, false);
        rows_back<ACT>(part, n0, count, p, tokens);
        const int64_t to = part * rows * rank + at;
        rows_times_rank(tokens, rank, natural, rank, tile, BLOCK, count, sums + to, rank);
        rows_times_rank(tokens, rank, up_natural, rank, up_z, BLOCK, count, up_sums + to, rank);
        if (call.gate.db) rank_sums(rank, count, tile, gate_h + at, rank, tokens, matrix_sums[0]);
        if (call.up.db) rank_sums(rank, count, up_z, up_h + at, rank, tokens, matrix_sums[1]);
        if (call.down.da) rank_sums(rank, count, d, weighted_g + at, rank, tokens, down_da);
    }

    template <int64_t ACT>
    void hidden_block(int64_t part, int64_t n0, int64_t count) {
        const int64_t n = args.n;
        for (int64_t t = 0; t < args.m; ++t) {
            memset(call.d_gate + t * n + n0, 0, (size_t)count * 4);
            memset(call.d_up + t * n + n0, 0, (size_t)count * 4);
        }
        for (int64_t e = 0; e < call.experts; ++e) {
            panels_of_b(call.gate, e, n, n0, count, panels[0]);
            panels_of_b(call.up, e, n, n0, count, panels[1]);
            rows_of_b(call.gate, e, n, n0, count, natural);
            rows_of_b(call.up, e, n, n0, count, up_natural);
            panels_of_a(call.down, e, n, n0, count, down_a);
            clear(matrix_sums[0]), clear(matrix_sums[1]), clear(down_da);
            tiles(e, [&](int64_t p, int64_t tokens) { hidden_tile<ACT>(part, n0, count, p, tokens); });
            const MixtureSide &gate = call.gate, &up = call.up, &down = call.down;
            if (gate.db) put_turned(matrix_sums[0], gate.r, count, gate.db, (e * n + n0) * gate.r);
            if (up.db) put_turned(matrix_sums[1], up.r, count, up.db, (e * n + n0) * up.r);
            if (down.da) put(down_da, down.r, count, down.da, e * down.r * n + n0, n);
        }
    }

    void hidden_part(int64_t part) {
        memset(sums + part * rows * rank, 0, (size_t)(rows * rank) * 4);
        memset(up_sums + part * rows * rank, 0, (size_t)(rows * rank) * 4);
        memset(dots + part * rows, 0, (size_t)rows * 4);
        blocks(args.n, part, [&](int64_t n0, int64_t count) {
            if (call.act == ACT_SILU) hidden_block<ACT_SILU>(part, n0, count);
            else hidden_block<ACT_GELU_TANH>(part, n0, count);
        });
    }

    void run() {
        int64_t* counter = shared.counters;
        const Reader readers[] = {{call.gate, nullptr, gate_g}, {call.up, nullptr, up_g}};
        all_rows(counter, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) {
                take_h(call.gate, p, (float)call.gate.scale, gate_h + p * rank);
                take_h(call.up, p, (float)call.up.scale, up_h + p * rank);
                take_h(call.down, p, (float)call.down.scale * call.w[call.order[p]], down_h + p * rank);
            }
        });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 1)) < out_parts;) output_part(call.down, down_h, i, sums);
        team_barrier(args);
        all_rows(counter + 2, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) {
                const float* g = down_g + p * rank;
                combine(sums, out_parts, p, (float)call.down.scale, down_g + p * rank);
                for (int64_t j = 0; j < rank; ++j) weighted_g[p * rank + j] = call.w[call.order[p]] * g[j];
            }
        });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 3)) < parts;) hidden_part(i);
        team_barrier(args);
        all_rows(counter + 4, [&](int64_t from, int64_t to) {
            for (int64_t p = from; p < to; ++p) {
                combine(sums, parts, p, (float)call.gate.scale, gate_g + p * rank);
                combine(up_sums, parts, p, (float)call.up.scale, up_g + p * rank);
                if (!call.dw) continue;
                float dot = 0;
                for (int64_t part = 0; part < parts; ++part) dot += dots[part * rows + p];
                call.dw[call.order[p]] = dot;
            }
        });
        team_barrier(args);
        for (int64_t i; (i = next_piece(counter + 5)) < ceil_div(args.k, BLOCK);)
            input_block(i * BLOCK, min64(BLOCK, args.k - i * BLOCK), readers);
    }
};

}  // namespace

#endif
