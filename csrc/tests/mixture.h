// Judges the kernels of a mixture of experts (csrc/cpu/mixture.h): an MLP and a linear, an expert without rows, rows
// without expert, a linear without adapters; every result against the equations in fp64.
#ifndef FASTLORA_TESTS_MIXTURE_H
#define FASTLORA_TESTS_MIXTURE_H

#include "support.h"

extern "C" {
int64_t fl_mixture_fwd(const Mixture*);
int64_t fl_mixture_bwd(const Mixture*);
int64_t fl_routed_fwd(const Mixture*);
int64_t fl_routed_bwd(const Mixture*);
}

namespace {

enum { EXPERTS = 4, SLOTS = 2 };

// One linear's stacked adapters, their gradients, and what these should be.
struct Adapters {
    int64_t r, in, out, dtype;
    double scale;
    Bytes a, b, da, db;
    Floats h;
    Doubles want_h, want_da, want_db;
    Adapters(int64_t rank, int64_t k, int64_t n, int64_t rows, int64_t type, double s)
        : r(rank),
          in(k),
          out(n),
          dtype(type),
          scale(s),
          a(typed(randoms(EXPERTS * rank * k, 1 / sqrt((double)k)), type)),
          b(typed(randoms(EXPERTS * n * rank, 1 / sqrt((double)rank + 1)), type)),
          da(poison(EXPERTS * rank * k, type)),
          db(poison(EXPERTS * n * rank, type)),
          h(poison(rows * rank)),
          want_h((size_t)(rows * rank)),
          want_da((size_t)(EXPERTS * rank * k)),
          want_db((size_t)(EXPERTS * n * rank)) {
        memset(h.data, 0, (size_t)(rows * rank) * 4);
    }
    double at_a(int64_t e, int64_t j, int64_t i) const { return to_f32_one(a.data, dtype, (e * r + j) * in + i); }
    double at_b(int64_t e, int64_t i, int64_t j) const { return to_f32_one(b.data, dtype, (e * out + i) * r + j); }
    void put(MixtureSide& side) {
        side.scale = scale, side.r = r;
        if (!r) return;
        side.a = a.data, side.b = b.data, side.h = h.data, side.da = da.data, side.db = db.data;
    }
    // y += s h b^T of one row; keeps h.
    void forward(int64_t e, int64_t row, const Doubles& x, double* y) {
        for (int64_t j = 0; j < r; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < in; ++i) sum += x[i] * at_a(e, j, i);
            want_h[row * r + j] = sum;
            for (int64_t i = 0; i < out; ++i) y[i] += scale * sum * at_b(e, i, j);
        }
    }
    // dx += s (d b) a; the gradients get `weight` times d.
    void backward(int64_t e, int64_t row, const double* d, double weight, const Doubles& x, double* dx) {
        for (int64_t j = 0; j < r; ++j) {
            double g = 0;
            for (int64_t i = 0; i < out; ++i) {
                g += scale * d[i] * at_b(e, i, j);
                want_db[(e * out + i) * r + j] += scale * weight * d[i] * want_h[row * r + j];
            }
            for (int64_t i = 0; i < in; ++i) {
                dx[i] += g * at_a(e, j, i);
                want_da[(e * r + j) * in + i] += weight * g * x[i];
            }
        }
    }
    void judge(int64_t rows) {
        if (!r) return;
        const double small = 32 * UNIT[F32], own = small + UNIT[dtype];
        close("h", h.data, F32, want_h, rows, small);
        close("da", da.data, dtype, want_da, 1, own);
        close("db", db.data, dtype, want_db, 1, own);
    }
};

struct MixtureCase {
    int64_t m, k, n, out, dtype;
    Mixture call{};
    std::vector<int64_t> owner, order, offsets;
    Floats w, dw;
    Bytes x, dy, gate, up, d;
    MixtureCase(int64_t tokens, int64_t in, int64_t width, int64_t outputs, int64_t type)
        : m(tokens),
          k(in),
          n(width),
          out(outputs),
          dtype(type),
          w(randoms(tokens * SLOTS)),
          dw(poison(tokens * SLOTS)),
          x(typed(randoms(tokens * in), type)),
          dy(typed(randoms(tokens * outputs), type)),
          gate(typed(randoms(tokens * width), type)),
          up(typed(randoms(tokens * width), type)),
          d(typed(randoms(tokens * width), type)) {
        const int64_t turns[] = {0, 1, 3, 0, EXPERTS, 1, 3, EXPERTS, 1, 0};  // expert 2 has none
        for (int64_t row = 0; row < m * SLOTS; ++row) owner.push_back(turns[row % 10]);
        for (int64_t e = 0; e <= EXPERTS; ++e) {
            offsets.push_back((int64_t)order.size());
            for (int64_t row = 0; row < m * SLOTS; ++row)
                if (owner[row] == e) order.push_back(row);
        }
        memset(dw.data, 0, (size_t)dw.count * 4);
        call.slots = SLOTS, call.out = out, call.experts = EXPERTS;
        call.order = order.data(), call.offsets = offsets.data(), call.w = w.data, call.dw = dw.data;
        call.args.m = m, call.args.k = k, call.args.n = n, call.args.dtype = dtype;
        call.args.x = x.data, call.args.dy = dy.data;
        call.gate_base = gate.data, call.up_base = up.data, call.d_hidden = d.data;
    }
    Doubles row_of(const Bytes& all, int64_t token, int64_t width) const {
        Doubles row((size_t)width);
        for (int64_t i = 0; i < width; ++i) row[i] = to_f32_one(all.data, dtype, token * width + i);
        return row;
    }
};

double dot_of(const Doubles& a, const Doubles& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

// act(v) and its slope.
void act_of(int64_t act, double v, double* value, double* slope) {
    const double c = 1.5957691216057308, u = act == ACT_SILU ? v : c * v * (1 + 0.044715 * v * v);
    const double inner = act == ACT_SILU ? 1 : c * (1 + 3 * 0.044715 * v * v), s = 1 / (1 + exp(-u));
    *value = v * s, *slope = s + v * s * (1 - s) * inner;
}

void check_mlp(int64_t tier, int64_t m, int64_t dtype, int64_t adapter_dtype, int64_t act, const int64_t* sizes,
               const int64_t* ranks, int64_t threads) {
    const int64_t k = sizes[0], n = sizes[1], out = sizes[2], rows = m * SLOTS;
    MixtureCase each(m, k, n, out, dtype);
    Adapters gate(ranks[0], k, n, rows, adapter_dtype, 0.5), up(ranks[1], k, n, rows, adapter_dtype, 1.5);
    Adapters down(ranks[2], n, out, rows, adapter_dtype, 2);
    Floats hidden = poison(m * n), y = randoms(m * out), d_gate = poison(m * n), d_up = poison(m * n);
    Floats dx = randoms(m * k);
    Doubles want_hidden(m * n), want_y(m * out), want_d_gate(m * n), want_d_up(m * n), want_dx(m * k), want_dw(rows);
    for (int64_t i = 0; i < m * out; ++i) want_y[i] = y[i];
    for (int64_t i = 0; i < m * k; ++i) want_dx[i] = dx[i];
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t e = each.owner[row], t = row / SLOTS;
        if (e == EXPERTS) continue;
        const double w = each.w[row];
        const Doubles x = each.row_of(each.x, t, k), dy = each.row_of(each.dy, t, out);
        Doubles z1 = each.row_of(each.gate, t, n), z3 = each.row_of(each.up, t, n), d = each.row_of(each.d, t, n);
        gate.forward(e, row, x, z1.data()), up.forward(e, row, x, z3.data());
        Doubles u(n), value(n), slope(n), last(out), d1(n), d3(n), own(k);
        for (int64_t i = 0; i < n; ++i) {
            act_of(act, z1[i], &value[i], &slope[i]);
            u[i] = value[i] * z3[i];
            want_hidden[t * n + i] += w * u[i];
        }
        down.forward(e, row, u, last.data());
        for (int64_t i = 0; i < out; ++i) want_y[t * out + i] += w * last[i];
        down.backward(e, row, dy.data(), w, u, d.data());
        want_dw[row] = dot_of(d, u);
        for (int64_t i = 0; i < n; ++i) {
            d1[i] = w * d[i] * z3[i] * slope[i], d3[i] = w * d[i] * value[i];
            want_d_gate[t * n + i] += d1[i], want_d_up[t * n + i] += d3[i];
        }
        gate.backward(e, row, d1.data(), 1, x, own.data()), up.backward(e, row, d3.data(), 1, x, own.data());
        for (int64_t i = 0; i < k; ++i) want_dx[t * k + i] += own[i];
    }
    Mixture& call = each.call;
    call.args.r = ranks[0] > ranks[1] ? ranks[0] : ranks[1];
    if (ranks[2] > call.args.r) call.args.r = ranks[2];
    call.args.tier = tier, call.args.threads = threads, call.adapter_dtype = adapter_dtype, call.act = act;
    call.hidden = hidden.data, call.y = y.data, call.d_gate = d_gate.data, call.d_up = d_up.data, call.dx = dx.data;
    gate.put(call.gate), up.put(call.up), down.put(call.down);
    require(fl_mixture_fwd(&call) == FL_OK, "forward refused");
    require(fl_mixture_bwd(&call) == FL_OK, "backward refused");
    const double small = 32 * UNIT[F32];
    close("hidden", hidden.data, F32, want_hidden, m, small);
    close("y", y.data, F32, want_y, m, small);
    close("d gate", d_gate.data, F32, want_d_gate, m, small);
    close("d up", d_up.data, F32, want_d_up, m, small);
    close("dx", dx.data, F32, want_dx, m, small);
    close("dw", each.dw.data, F32, want_dw, 1, small);
    gate.judge(rows), up.judge(rows), down.judge(rows);
}

void check_routed(int64_t tier, int64_t m, int64_t dtype, int64_t adapter_dtype, int64_t r, int64_t threads) {
    const int64_t k = 75, n = 300, rows = m * SLOTS;
    MixtureCase each(m, k, 0, n, dtype);
    Adapters only(r, k, n, rows, adapter_dtype, 0.5);
    Floats y = randoms(m * n), dx = randoms(m * k);
    Doubles want_y(m * n), want_dx(m * k), want_dw(rows);
    for (int64_t i = 0; i < m * n; ++i) want_y[i] = y[i];
    for (int64_t i = 0; i < m * k; ++i) want_dx[i] = dx[i];
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t e = each.owner[row], t = row / SLOTS;
        if (e == EXPERTS) continue;
        const double w = each.w[row];
        const Doubles x = each.row_of(each.x, t, k), dy = each.row_of(each.dy, t, n);
        Doubles own(n), back(k);
        only.forward(e, row, x, own.data());
        want_dw[row] = dot_of(own, dy);
        only.backward(e, row, dy.data(), w, x, back.data());
        for (int64_t i = 0; i < n; ++i) want_y[t * n + i] += w * own[i];
        for (int64_t i = 0; i < k; ++i) want_dx[t * k + i] += w * back[i];
    }
    Mixture& call = each.call;
    call.args.r = r, call.args.tier = tier, call.args.threads = threads, call.adapter_dtype = adapter_dtype;
    call.y = y.data, call.dx = dx.data;
    only.put(call.gate);
    require(fl_routed_fwd(&call) == FL_OK, "forward refused");
    require(fl_routed_bwd(&call) == FL_OK, "backward refused");
    const double small = 32 * UNIT[F32];
    close("y", y.data, F32, want_y, m, small);
    close("dx", dx.data, F32, want_dx, m, small);
    close("dw", each.dw.data, F32, want_dw, 1, small);
    only.judge(rows);
}

void check_mixture(int64_t tier) {
    const int64_t sizes[][3] = {{37, 75, 20}, {130, 300, 256}}, ranks[][3] = {{5, 16, 33}, {16, 0, 0}, {0, 3, 16}};
    for (int64_t dtype : {F32, BF16, F16})
        for (int64_t adapter_dtype : {(int64_t)F32, dtype})
            for (int64_t m : {1, 3, 70}) {
                char text[96];
                snprintf(text, sizeof text, "mixture tier %d m %d dtype %d/%d", (int)tier, (int)m, (int)dtype,
                         (int)adapter_dtype);
                context = text;
                check_mlp(tier, m, dtype, adapter_dtype, m & 1, sizes[m > 3], ranks[m % 3], m > 3 ? 3 : 1);
                check_routed(tier, m, dtype, adapter_dtype, m > 3 ? 17 : 4, m > 3 ? 3 : 1);
            }
}

}  // namespace

#endif
