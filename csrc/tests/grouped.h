// Judges the kernels of a batch that mixes adapters (csrc/cpu/grouped.h): LoRA with and without dropout, DoRA, an
// adapter without rows, rows without adapter; y, dx and every gradient against the equations in fp64.
#ifndef FASTLORA_TESTS_GROUPED_H
#define FASTLORA_TESTS_GROUPED_H

#include "support.h"

extern "C" {
int64_t fl_grouped_mask(const Grouped*);
int64_t fl_grouped_fwd(const Grouped*);
int64_t fl_grouped_bwd(const Grouped*);
}

namespace {

enum { ADAPTERS = 4, TURNS = 7 };
struct GroupedCall {
    Grouped call;
    Member members[ADAPTERS];
};

// Rows take adapters 0, 1, 0, none, 3, 0, 3 in turns; adapter 2 has none.
const int64_t OWNER[TURNS] = {0, 1, 0, ADAPTERS, 3, 0, 3};

void check_grouped_case(int64_t tier, int64_t m, int64_t n, int64_t k, int64_t dtype, int64_t adapter_dtype,
                        int64_t threads) {
    char text[96];
    snprintf(text, sizeof text, "grouped tier %d m %d n %d k %d dtype %d/%d", (int)tier, (int)m, (int)n, (int)k,
             (int)dtype, (int)adapter_dtype);
    context = text;
    const int64_t ranks[ADAPTERS] = {5, 16, 3, 33}, largest = 33;
    std::vector<int64_t> order, offsets(ADAPTERS + 1);
    for (int64_t e = 0; e <= ADAPTERS; ++e) {
        offsets[e] = (int64_t)order.size();
        for (int64_t row = 0; row < m; ++row)
            if (OWNER[row % TURNS] == e) order.push_back(row);
    }
    Bytes x = typed(randoms(m * k), dtype), dy = typed(randoms(m * n), dtype), y = typed(randoms(m * n), dtype);
    Bytes dx = typed(randoms(m * k), dtype), mask(m * ((k + 7) / 8)), z = poison(m * n, dtype);
    Floats h(m * largest), bias = randoms(n), mag = randoms(n), norm(n);
    for (int64_t i = 0; i < n; ++i) mag[i] = 1 + fabsf(mag[i]), norm[i] = 1.5f;
    std::vector<Bytes> a, b, da, db;
    Floats dmag = poison(n);
    GroupedCall record{};
    int64_t seed = 77;
    for (int64_t e = 0; e < ADAPTERS; ++e) {
        a.push_back(typed(randoms(ranks[e] * k, 1 / sqrt((double)k)), adapter_dtype));
        b.push_back(typed(randoms(n * ranks[e], 1 / sqrt((double)ranks[e])), adapter_dtype));
        da.push_back(poison(ranks[e] * k, adapter_dtype)), db.push_back(poison(n * ranks[e], adapter_dtype));
        Member& member = record.members[e];
        member.a = a[e].data, member.b = b[e].data, member.da = da[e].data, member.db = db[e].data;
        member.r = ranks[e], member.scale = 0.5 + (double)e, member.keep_scale = 1, member.stream = 3 * e;
        if (e == 0) member.threshold = 16384, member.drops = 1, member.keep_scale = 65536.0 / (65536 - 16384);
        if (e == 1) member.mag = mag.data, member.norm = norm.data, member.dmag = dmag.data;
    }
    Args& args = record.call.args;
    args.m = m, args.n = n, args.k = k, args.r = largest, args.dtype = dtype, args.tier = tier, args.threads = threads;
    args.seed = &seed, args.x = x.data, args.y = y.data, args.bias = bias.data, args.h = h.data, args.z = z.data;
    args.mask = mask.data, args.dy = dy.data, args.dx = dx.data;
    record.call.groups = ADAPTERS, record.call.adapter_dtype = adapter_dtype;
    record.call.order = order.data(), record.call.offsets = offsets.data();
    memset(mask.data, 0, (size_t)mask.count), memset(h.data, 0, (size_t)h.count * 4);

    Doubles want_y(m * n), want_dx(m * k), want_da[ADAPTERS], want_db[ADAPTERS], want_dmag(n);
    for (int64_t e = 0; e < ADAPTERS; ++e) want_da[e].resize(ranks[e] * k), want_db[e].resize(n * ranks[e]);
    for (int64_t i = 0; i < m * n; ++i) want_y[i] = to_f32_one(y.data, dtype, i);
    for (int64_t i = 0; i < m * k; ++i) want_dx[i] = to_f32_one(dx.data, dtype, i);
    require(fl_grouped_mask(&record.call) == FL_OK, "mask refused");
    for (int64_t row = 0; row < m; ++row) {
        const int64_t e = OWNER[row % TURNS];
        if (e == ADAPTERS) continue;
        const Member& own = record.members[e];
        Doubles xd(k), low(own.r), g(own.r);
        for (int64_t i = 0; i < k; ++i) {
            const bool kept = mask[row * ((k + 7) / 8) + i / 8] >> (i & 7) & 1;
            require(own.drops || kept, "mask: dropped where nothing drops");
            xd[i] = kept ? own.keep_scale * to_f32_one(x.data, dtype, row * k + i) : 0;
        }
        for (int64_t j = 0; j < own.r; ++j)
            for (int64_t i = 0; i < k; ++i) low[j] += xd[i] * to_f32_one(own.a, adapter_dtype, j * k + i);
        for (int64_t i = 0; i < n; ++i) {
            double delta = 0;
            const double c = own.mag ? (double)mag[i] / norm[i] : 1, grad = to_f32_one(dy.data, dtype, row * n + i);
            for (int64_t j = 0; j < own.r; ++j) {
                const double w = to_f32_one(own.b, adapter_dtype, i * own.r + j);
                delta += own.scale * low[j] * w;
                g[j] += own.scale * c * grad * w;
                want_db[e][i * own.r + j] += own.scale * c * grad * low[j];
            }
            const double base = want_y[row * n + i] - bias[i] + delta;
            want_y[row * n + i] += delta + (own.mag ? (c - 1) * base : 0);
            if (own.mag) want_dmag[i] += grad * base / norm[i];
        }
        for (int64_t i = 0; i < k; ++i) {
            const bool kept = mask[row * ((k + 7) / 8) + i / 8] >> (i & 7) & 1;
            for (int64_t j = 0; j < own.r; ++j) {
                if (kept) want_dx[row * k + i] += own.keep_scale * g[j] * to_f32_one(own.a, adapter_dtype, j * k + i);
                want_da[e][j * k + i] += g[j] * xd[i];
            }
        }
    }
    require(fl_grouped_fwd(&record.call) == FL_OK, "forward refused");
    require(fl_grouped_bwd(&record.call) == FL_OK, "backward refused");
    const double small = 16 * UNIT[F32], wide = small + 2 * UNIT[dtype], own = small + UNIT[adapter_dtype];
    close("y", y.data, dtype, want_y, m, wide);
    close("dx", dx.data, dtype, want_dx, m, wide);
    close("dmag", dmag.data, F32, want_dmag, 1, wide);
    for (int64_t e = 0; e < ADAPTERS; ++e) {
        close("da", da[e].data, adapter_dtype, want_da[e], 1, own);
        close("db", db[e].data, adapter_dtype, want_db[e], 1, own);
    }
}

void check_grouped(int64_t tier) {
    for (int64_t dtype : {F32, BF16, F16})
        for (int64_t adapter_dtype : {(int64_t)F32, dtype})
            for (int64_t m : {1, 5, 14, 90}) {
                check_grouped_case(tier, m, 37, 75, dtype, adapter_dtype, 1);
                check_grouped_case(tier, m, 300, 1100, dtype, adapter_dtype, 3);
            }
    check_grouped_case(tier, 2000, 20, 40, F32, F32, 2);  // more rows of one adapter than a tile of gradients
}

}  // namespace

#endif
