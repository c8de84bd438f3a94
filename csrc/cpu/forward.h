// lora_fwd. With xd = keep_scale * mask o x, h = xd a^T:
//     LoRA             y = x w^T + s h b^T + bias
//     DoRA             z = x w^T + s h b^T,   y = c o z + bias,            c = mag / norm
//     DoRA, own drop   z = xd w^T + s h b^T,  y = x w^T + s h b^T + (c - 1) o z + bias
// First all threads pack panels of x and form h, then they share out tiles of features.
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
    const int64_t units, rank, features;
    const bool drop, dora, twice;
    // shared
    float *a_t, *scaled_h, *packed, *packed_drop;
    // one thread's
    float *rows, *units_buffer, *panel, *h_panel, *mask_buffer, *tile, *c1, *c2, *b_t, *scales, *out, *out2, *column;

    Forward(Shared& s)
        : args(s.args),
          shared(s),
          units(PAIR ? ceil_div(args.k, 2) : args.k),
          rank(padded_rank(args)),
          features(args.m <= MANY ? (int64_t)FEATURES_FWD_FEW : features_of(args.n, FEATURES_FWD, args.threads)),
          drop(args.flags & DROPOUT),
          dora(args.flags & DORA),
          twice(two_bases(args)) {}

    int64_t carve_shared(float* base) {
        Arena arena(base);
        const int64_t lanes = chunk_lanes(args);
        a_t = arena.take(args.k * rank);
        scaled_h = arena.take(lanes * rank);
        packed = arena.take(lanes * units);
        packed_drop = arena.take(twice ? lanes * units : 0);
        return arena.used;
    }

    int64_t carve_thread(float* base) {
        Arena arena(base);
        const int64_t lanes = chunk_lanes(args);
        rows = arena.take(PANEL * DEPTH);
        units_buffer = arena.take(PANEL * DEPTH / 2);
        panel = arena.take(PANEL * DEPTH);
        h_panel = arena.take(rank * PANEL);
        mask_buffer = arena.take(drop ? PANEL * ceil_div(args.k, 8) / 4 + PANEL : 0);
        tile = arena.take(features * Tiled<PAIR>::LD);
        c1 = arena.take(lanes * features);
        c2 = arena.take(twice ? lanes * features : 0);
        b_t = arena.take((args.r + 1) * features);
        scales = arena.take(args.absmax_codes ? features * args.k / args.blocksize + 2 : 0);
        out = arena.take(PANEL * features);
        out2 = arena.take(twice ? PANEL * features : 0);
        column = arena.take(features);
        return arena.used;
    }

    // h of one panel, [rank][width], already times keep_scale; also fills the packed copies of x.
    void pack(const Chunk& chunk, int64_t p) {
        const int64_t tokens = chunk.tokens(p), width = chunk.width(p), row0 = chunk.first + p * PANEL;
        const int64_t groups = ceil_div(args.k, 8);
        uint8_t* bits = args.mask ? args.mask + row0 * groups : (uint8_t*)mask_buffer;
        if (drop) mask_rows(args, row0, row0 + tokens, bits);
        memset(h_panel, 0, (size_t)(rank * width) * 4);
        for (int64_t k0 = 0; k0 < args.k; k0 += DEPTH) {
            const int64_t count = min64(DEPTH, args.k - k0), unit = PAIR ? k0 / 2 : k0;
            float* dst = packed + p * PANEL * units + unit * width;
            for (int64_t t = 0; t < tokens; ++t)
                to_f32(args.x, args.dtype, (row0 + t) * args.k + k0, count, rows + t * DEPTH);
            put_panel<PAIR>(rows, tokens, count, width, units_buffer, dst);
            if (drop) {
                for (int64_t t = 0; t < tokens; ++t)
                    apply_mask(rows + t * DEPTH, bits + t * groups, k0, count, rows + t * DEPTH);
                if (twice)
                    put_panel<PAIR>(rows, tokens, count, width, units_buffer,
                                    packed_drop + p * PANEL * units + unit * width);
            }
            if (drop || PAIR) to_panel(rows, DEPTH, tokens, count, width, dst = panel);
            adapter_times_panel(dst, width, width, a_t + k0 * rank, rank, count, h_panel, width, rank);
        }
        float* scaled = scaled_h + p * PANEL * rank;
        for (int64_t i = 0; i < rank * width; ++i) {
            h_panel[i] *= (float)args.keep_scale;
            scaled[i] = h_panel[i] * (float)args.scale;
        }
        if (args.h)
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t j = 0; j < args.r; ++j) args.h[(row0 + t) * args.r + j] = h_panel[j * width + t];
    }

    void base(const Chunk& chunk, int64_t n0, int64_t count, Source& source) {
        enum { UNITS = Tiled<PAIR>::UNITS, LD = Tiled<PAIR>::LD };
        for (int64_t unit = 0; unit < units; unit += UNITS) {
            const int64_t depth = min64(UNITS, units - unit), from = unit * (1 + PAIR);
            tile_fwd<PAIR>(source, n0, count, from, min64(args.k, from + UNITS * (1 + PAIR)), tile);
            for (int64_t p = 0; p < chunk.panels(); ++p) {
                const int64_t width = chunk.width(p), at = p * PANEL * units + unit * width, c = p * PANEL * features;
                tile_times_panel<LD, PAIR>(packed + at, width, tile, 1, depth, c1 + c, count);
                if (twice) tile_times_panel<LD, PAIR>(packed_drop + at, width, tile, 1, depth, c2 + c, count);
            }
        }
    }

    void adapter(const Chunk& chunk, int64_t n0, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < args.r; ++j) b_t[j * features + i] = args.b[(n0 + i) * args.r + j];
        for (int64_t p = 0; p < chunk.panels(); ++p) {
            const int64_t width = chunk.width(p);
            const float* h = scaled_h + p * PANEL * rank;
            tile_times_panel<1, false>(h, width, b_t, features, args.r, c1 + p * PANEL * features, count);
            if (!twice) continue;
            float* c = c2 + p * PANEL * features;
            for (int64_t i = 0; i < count * width; ++i) c[i] *= (float)args.keep_scale;
            tile_times_panel<1, false>(h, width, b_t, features, args.r, c, count);
        }
    }

    void finish(const Chunk& chunk, int64_t n0, int64_t count) {
        const float* bias = args.bias ? args.bias + n0 : nullptr;
        if (dora)
            for (int64_t i = 0; i < count; ++i) column[i] = args.mag[n0 + i] / args.norm[n0 + i];
        for (int64_t p = 0; p < chunk.panels(); ++p) {
            const int64_t tokens = chunk.tokens(p), width = chunk.width(p);
            from_panel(c1 + p * PANEL * features, count, width, tokens, out, features);
            if (twice) from_panel(c2 + p * PANEL * features, count, width, tokens, out2, features);
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t to = (chunk.first + p * PANEL + t) * args.n + n0;
                float* y = out + t * features;
                const float* z = twice ? out2 + t * features : y;
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
    }

    void features_tile(const Chunk& chunk, int64_t index) {
        const int64_t n0 = index * features, count = min64(features, args.n - n0);
        const size_t bytes = (size_t)(chunk.panels() * PANEL * features) * 4;
        Source source(args);
        source.use_scales(n0 * args.k, (n0 + count) * args.k, scales);
        memset(c1, 0, bytes);
        if (twice) memset(c2, 0, bytes);
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
            for (int64_t p; (p = next_piece(counter)) < chunk.panels();) pack(chunk, p);
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
