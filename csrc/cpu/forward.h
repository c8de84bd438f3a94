// lora_fwd. With xd = keep_scale * mask o x, h = xd a^T:
//     LoRA             y = x w^T + s h b^T + bias
//     DoRA             z = x w^T + s h b^T,   y = c o z + bias,            c = mag / norm
//     DoRA, own drop   z = xd w^T + s h b^T,  y = x w^T + s h b^T + (c - 1) o z + bias
// First all threads form h (and make x readable where it is not), then they share out tiles of features.
#ifndef FASTLORA_CPU_FORWARD_H
#define FASTLORA_CPU_FORWARD_H

namespace {

FL_INLINE bool two_bases(const Args& args) {
    return (args.flags & DORA) && (args.flags & DROPOUT) && !(args.flags & SHARED);
}

template <bool PAIR>
struct Forward {
    const Args& args;
    Shared& shared;
    const int64_t units, rank, panels, features, depth;
    const bool drop, dora, twice, direct;
    const int64_t stride;  // of a readable row of x
    // shared; a_t [k][rank], scaled_h [tokens][rank], copies of x and of the dropped x [tokens][stride]
    float *a_t, *scaled_h, *copy, *copy_drop;
    // one thread's
    float *rows, *h_rows, *mask_buffer, *tile, *turned, *c1, *c2, *b_t, *scales, *column;

    Forward(Shared& s)
        : args(s.args),
          shared(s),
          units(PAIR ? ceil_div(args.k, 2) : args.k),
          rank(padded_rank(args)),
          panels(panels_of(args.n, args.threads)),
          features(panels * PANEL),
          depth(depth_of(units)),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)),
          direct(readable<PAIR>(args.dtype, args.k)),
          stride(direct ? units : padded_units(units)) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        const int64_t tokens = chunk_tokens(args);
        a_t = arena.take(args.k * rank);
        scaled_h = arena.take(tokens * rank);
        copy = arena.take(direct ? 0 : tokens * stride);
        copy_drop = arena.take(twice ? tokens * stride : 0);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        const int64_t tokens = chunk_tokens(args);
        rows = arena.take(PIECE * DEPTH);
        h_rows = arena.take(PIECE * rank);
        mask_buffer = arena.take(drop ? PIECE * ceil_div(args.k, 8) / 4 + 1 : 0);
        tile = arena.take(panels * depth * PANEL);
        turned = arena.take(PANEL * (DEPTH + 16));
        c1 = arena.take(tokens * features);
        c2 = arena.take(twice ? tokens * features : 0);
        b_t = arena.take(args.r * features);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        column = arena.take(features);
        return arena.used;
    }

    const float* x_rows(const Chunk& chunk) const {
        return direct ? (const float*)args.x + chunk.first * stride : copy;
    }

    // h of a piece of tokens, and their readable rows.
    void prepare(const Chunk& chunk, int64_t piece) {
        const int64_t t0 = piece * PIECE, tokens = min64(PIECE, chunk.count - t0), row0 = chunk.first + t0;
        const int64_t groups = ceil_div(args.k, 8);
        uint8_t* bits = args.mask ? args.mask + row0 * groups : (uint8_t*)mask_buffer;
        if (drop) mask_rows(args, row0, row0 + tokens, bits);
        memset(h_rows, 0, (size_t)(PIECE * rank) * 4);
        for (int64_t k0 = 0; k0 < args.k; k0 += DEPTH) {
            const int64_t count = min64(DEPTH, args.k - k0), unit = PAIR ? k0 / 2 : k0;
            const float* x = (const float*)args.x + row0 * args.k + k0;
            int64_t ldx = args.k;
            if (args.dtype != F32 || drop || crowded(args.k)) {
                for (int64_t t = 0; t < tokens; ++t) {
                    float* row = rows + t * DEPTH;
                    to_f32(args.x, args.dtype, (row0 + t) * args.k + k0, count, row);
                    if (!direct) put_row<PAIR>(row, count, copy + (t0 + t) * stride + unit);
                    if (drop) apply_mask(row, bits + t * groups, k0, count, row);
                    if (twice) put_row<PAIR>(row, count, copy_drop + (t0 + t) * stride + unit);
                }
                x = rows, ldx = DEPTH;
            }
            rows_times_rank(tokens, rank, a_t + k0 * rank, rank, x, ldx, count, h_rows, rank);
        }
        for (int64_t t = 0; t < tokens; ++t) {
            float *h = h_rows + t * rank, *scaled = scaled_h + (t0 + t) * rank;
            for (int64_t j = 0; j < rank; ++j) {
                h[j] *= (float)args.keep_scale;
                scaled[j] = h[j] * (float)args.scale;
            }
            if (args.h) memcpy(args.h + (row0 + t) * args.r, h, (size_t)args.r * 4);
        }
    }

    void base(const Chunk& chunk, int64_t n0, int64_t count, const Source& source) {
        if (!units) clear(chunk);
        for (int64_t unit = 0; unit < units; unit += depth) {
            const int64_t steps = min64(depth, units - unit), from = unit * (1 + PAIR);
            for (int64_t j = 0; j < count; j += PANEL)
                panel_fwd<PAIR>(source, n0 + j, min64(PANEL, count - j), from,
                                min64(args.k, from + steps * (1 + PAIR)), PANEL, turned, tile + j * depth);
            rows_times_tile<PAIR>(chunk.count, count, tile, depth * PANEL, x_rows(chunk) + unit, stride, steps,
                                  c1, features, unit > 0);
            if (twice)
                rows_times_tile<PAIR>(chunk.count, count, tile, depth * PANEL, copy_drop + unit, stride, steps,
                                      c2, features, unit > 0);
        }
    }

    void clear(const Chunk& chunk) {  // a layer without inputs
        memset(c1, 0, (size_t)(chunk.count * features) * 4);
        if (twice) memset(c2, 0, (size_t)(chunk.count * features) * 4);
    }

    void adapter(const Chunk& chunk, int64_t n0, int64_t count) {
        if (twice)
            for (int64_t i = 0; i < chunk.count * features; ++i) c2[i] *= (float)args.keep_scale;
        if (!args.r) return;
        for (int64_t j = 0; j < count; j += PANEL)
            transpose(args.b + (n0 + j) * args.r, min64(PANEL, count - j), args.r, args.r, b_t + j * args.r, PANEL);
        rows_times_tile<false>(chunk.count, count, b_t, args.r * PANEL, scaled_h, rank, args.r, c1, features, true);
        if (twice)
            rows_times_tile<false>(chunk.count, count, b_t, args.r * PANEL, scaled_h, rank, args.r, c2, features, true);
    }

    void finish(const Chunk& chunk, int64_t n0, int64_t count) {
        const float* bias = args.bias ? args.bias + n0 : nullptr;
        if (dora)
            for (int64_t i = 0; i < count; ++i) column[i] = args.mag[n0 + i] / args.norm[n0 + i];
        for (int64_t t = 0; t < chunk.count; ++t) {
            const int64_t to = (chunk.first + t) * args.n + n0;
            float* y = c1 + t * features;
            const float* z = twice ? c2 + t * features : y;
            if (args.z) from_f32(z, count, args.z, args.dtype, to);
            if (twice)
                for (int64_t i = 0; i < count; ++i) y[i] += (column[i] - 1.0f) * z[i];
            else if (dora)
                for (int64_t i = 0; i < count; ++i) y[i] *= column[i];
            if (bias)
                for (int64_t i = 0; i < count; ++i) y[i] += bias[i];
            from_f32(y, count, args.y, args.dtype, to);
        }
    }

    void features_tile(const Chunk& chunk, int64_t index) {
        const int64_t n0 = index * features, count = min64(features, args.n - n0);
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        base(chunk, n0, count, source);
        adapter(chunk, n0, count);
        finish(chunk, n0, count);
    }

    void run() {
        int64_t* counter = shared.counters;
        for (int64_t i; (i = next_piece(counter) * DEPTH) < args.k;)
            transpose_padded(args.a, args.r, args.k, rank, i, min64(args.k, i + DEPTH), a_t);
        ++counter;
        team_barrier(args);
        const int64_t tiles = ceil_div(args.n, features);
        for (int64_t index = 0; index < chunks_of(args); ++index, counter += 2) {
            const Chunk chunk = chunk_at(args, index);
            for (int64_t i; (i = next_piece(counter)) < chunk.pieces();) prepare(chunk, i);
            team_barrier(args);
            for (int64_t i; (i = next_piece(counter + 1)) < tiles;) features_tile(chunk, i);
            if (index + 1 < chunks_of(args)) team_barrier(args);
        }
    }
};

// Scratch for a worker, then its run. The first thread to arrive makes the shared part before the team starts.
template <class Worker>
static void work(Shared& shared) {
    Worker worker(shared);
    worker.carve_shared(shared.memory);
    float* memory = fl_scratch(SCRATCH_THREAD, worker.carve_thread(nullptr));
    if (!memory) __atomic_store_n(&shared.failed, 1, __ATOMIC_RELAXED);
    team_barrier(shared.args);
    if (__atomic_load_n(&shared.failed, __ATOMIC_RELAXED)) return;
    worker.carve_thread(memory);
    worker.run();
}

template <class Worker>
static int64_t shared_floats(Shared& shared) {
    return Worker(shared).carve_shared(nullptr);
}

}  // namespace

#endif
