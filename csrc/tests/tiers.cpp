// Judges the instruction tiers of the CPU library without Python: built with the library's sources into one program,
// it also runs where there is none (an emulator, sanitizers).
//
//     tiers [TIER ...]      the tiers that must be there, by name; without any, all that this CPU has
//
// Codes, dequantized values and masks must be those of the scalar tier and of a plain definition, bit for bit; products
// must stay within rounding of the same equations in fp64. Each operand ends where memory ends (a page without access;
// under AddressSanitizer, its own red zones), and results must not depend on the number of threads.
#include "grouped.h"
#include "mixture.h"
#include "support.h"

extern "C" {
int64_t fl_has_tier(int64_t);
int64_t fl_quantize(const Args*);
int64_t fl_quantize_absmax(const Args*);
int64_t fl_dequantize(const Args*);
int64_t fl_dropout_mask(const Args*);
int64_t fl_dora_norm(const Args*);
int64_t fl_lora_fwd(const Args*);
int64_t fl_lora_bwd(const Args*);
}

namespace {

const char* TIER_NAMES[] = {"scalar", "avx2", "avx512", "avx512_bf16", "neon"};
const char* DTYPE_NAMES[] = {"fp32", "bf16", "fp16"};

// --- formats ---------------------------------------------------------------------------------------------------------

int naive_code(float v, int64_t kind) {
    int below = 0;
    if (kind == NF4) {
        for (int i = 0; i < 15; ++i) below += !(v <= fl_nf4_mid[i]);
        return below;
    }
    for (int i = 0; i < 7; ++i) below += !(fabsf(v) <= fl_fp4_mid[i]);
    return fl_fp4_order[below] | (v < 0 ? 8 : 0);
}

struct Packed {
    int64_t kind, blocksize, count;
    Bytes packed;
    Floats absmax;
    Bytes codes;  // nested
    Floats nested, offset;
    bool is_nested = false;
    float scale(int64_t i) const {
        const int64_t block = i / blocksize;
        if (!is_nested) return absmax[block];
        return fl_dynamic_map[codes[block]] * nested[block / 256] + offset[0];
    }
    int code(int64_t i) const { return i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4; }
    void put(Args& args) const {
        args.kind = kind, args.blocksize = blocksize, args.packed = packed.data;
        args.absmax = is_nested ? nullptr : absmax.data;
        if (is_nested)
            args.absmax_codes = codes.data, args.nested_absmax = nested.data, args.nested_offset = offset.data;
    }
};

Packed quantized(const Bytes& w, int64_t dtype, int64_t kind, int64_t blocksize, bool nested, int64_t tier,
                 int64_t threads = 1) {
    const int64_t count = w.count / item_size(dtype), blocks = (count + blocksize - 1) / blocksize;
    Packed p{kind, blocksize, count, Bytes((count + 1) / 2), poison(blocks), Bytes(nested ? blocks : 0),
             Floats(nested ? (blocks + 255) / 256 : 0), Floats(1), nested};
    Args args{};
    args.k = count, args.dtype = dtype, args.tier = tier, args.threads = threads;
    args.kind = kind, args.blocksize = blocksize;
    args.x = w.data, args.out_bytes = p.packed.data, args.out_scales = p.absmax.data;
    require(fl_quantize(&args) == FL_OK, "quantize refused");
    if (!nested) return p;
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += p.absmax[i];
    p.offset[0] = (float)(sum / (double)blocks);
    Args scales{};
    scales.k = blocks, scales.tier = tier, scales.threads = threads, scales.x = p.absmax.data;
    scales.nested_offset = p.offset.data, scales.out_bytes = p.codes.data, scales.out_scales = p.nested.data;
    require(fl_quantize_absmax(&scales) == FL_OK, "quantize_absmax refused");
    return p;
}

void check_codes(const Bytes& w, int64_t dtype, const Packed& p) {
    for (int64_t block = 0; block * p.blocksize < p.count; ++block) {
        const int64_t first = block * p.blocksize, last = min64(p.count, first + p.blocksize);
        float most = 0;
        for (int64_t i = first; i < last; ++i) {
            const float v = fabsf(to_f32_one(w.data, dtype, i));
            if (!(v <= most)) most = v;  // a NaN stays
            if (most != most) break;
        }
        const float found = p.absmax[block], inverse = 1.0f / (most < 1e-38f ? 1e-38f : most);
        require(bits_of(found) == bits_of(most) || (found != found && most != most), "absmax");
        bool good = true;
        for (int64_t i = first; i < last; ++i)
            good = good && p.code(i) == naive_code(to_f32_one(w.data, dtype, i) * inverse, p.kind);
        require(good, "a code beside its definition");
    }
    if (p.count & 1) require(p.code(p.count) == naive_code(0, p.kind), "the pad nibble");
}

Bytes dequantized(const Packed& p, int64_t dtype, int64_t tier, int64_t threads, const float* code) {
    Bytes out = poison(p.count, dtype);
    Args args{};
    p.put(args);
    args.k = p.count, args.dtype = dtype, args.tier = tier, args.threads = threads;
    args.code = code, args.y = out.data;
    require(fl_dequantize(&args) == FL_OK, "dequantize refused");
    return out;
}

void check_values(const Packed& p, int64_t tier, const float* code = nullptr) {
    const float* table = code ? code : p.kind == FP4 ? fl_fp4_code : fl_nf4_code;
    for (int64_t dtype : {F32, BF16, F16}) {
        const Bytes actual = dequantized(p, dtype, tier, 1, code);
        Bytes expected(p.count * item_size(dtype));
        for (int64_t i = 0; i < p.count; ++i) from_f32_one(table[p.code(i)] * p.scale(i), expected.data, dtype, i);
        require(same_numbers(actual, expected, dtype), std::string("dequantized to ") + DTYPE_NAMES[dtype]);
        require(same_numbers(actual, dequantized(p, dtype, TIER_SCALAR, 1, code), dtype), "scalar tier's values");
        require(same_numbers(actual, dequantized(p, dtype, tier, 2, code), dtype), "values of two threads");
    }
}

const int64_t WIDTHS[] = {1, 7, 16, 32, 33, 48, 75, 80, 96, 100, 1040, 4304};

void check_formats(int64_t tier) {
    for (int64_t width : WIDTHS)
        for (int64_t kind : {NF4, FP4})
            for (int64_t blocksize : {32, 64, 256, 4096})
                for (int64_t dtype : {F32, BF16, F16}) {
                    state = (uint64_t)(width * 131 + blocksize + dtype);
                    Floats w = randoms(5 * width);
                    if (width >= 48) {
                        w[3] = NAN, w[2 * width + width / 2] = INFINITY, w[3 * width - 1] = -INFINITY;
                        for (int64_t i = width; i < 2 * width; ++i) w[i] = 0;
                    }
                    const Bytes source = typed(w, dtype);
                    context = std::string(TIER_NAMES[tier]) + " formats, width " + std::to_string(width) + ", kind " +
                              std::to_string(kind) + ", blocks of " + std::to_string(blocksize) + ", " +
                              DTYPE_NAMES[dtype];
                    const Packed p = quantized(source, dtype, kind, blocksize, false, tier, 2);
                    const Packed scalar = quantized(source, dtype, kind, blocksize, false, TIER_SCALAR);
                    require(same(p.packed, scalar.packed), "codes beside the scalar tier's");
                    check_codes(source, dtype, p);
                    check_values(p, tier);
                    if (width >= 48) continue;  // scales of infinity have no nested form
                    const Packed nested = quantized(source, dtype, kind, blocksize, true, tier);
                    const Packed other = quantized(source, dtype, kind, blocksize, true, TIER_SCALAR);
                    require(same(nested.codes, other.codes) && same(nested.nested, other.nested), "nested scales");
                    check_values(nested, tier);
                }
}

// Numbers beside every decision, scales that overflow or vanish, nested scales of many groups, streamed outputs.
void check_edges(int64_t tier) {
    context = std::string(TIER_NAMES[tier]) + " edges";
    for (double scale : {1.0, 0.1, 3.3e-5, 1e-30, 1e-38, 1e-44, 7e11, 3e38})
        for (int64_t kind : {NF4, FP4}) {
            const float* points = kind == NF4 ? fl_nf4_mid : fl_fp4_mid;
            Floats w(64 * 8);
            for (int64_t i = 0; i < w.count; ++i) {
                float v = i % 64 ? points[i / 2 % (kind == NF4 ? 15 : 7)] : 1.0f;
                for (int64_t steps = i / 64; i % 64 && steps; --steps) v = nextafterf(v, i & 1 ? 2.0f : -2.0f);
                w[i] = (float)((i & 4 ? -v : v) * scale);
            }
            const Bytes source = typed(w, F32);
            const Packed p = quantized(source, F32, kind, 64, false, tier);
            check_codes(source, F32, p);
            check_values(p, tier);
        }
    state = 5;
    Floats code = randoms(16, 2);
    code[3] = NAN, code[4] = INFINITY, code[5] = -0.0f, code[6] = 65504, code[7] = 65520, code[8] = 6e-8f;
    code[9] = 3e38f;
    for (int64_t blocksize : {32, 64}) {
        const int64_t count = blocksize * 40 - 7;
        Packed p = quantized(typed(randoms(count), F32), F32, NF4, blocksize, false, tier);
        for (int64_t i = 0; i < p.absmax.count; ++i) p.absmax[i] = (float)exp2(-150 + 7 * (double)i) * 1.37f;
        p.absmax[1] = NAN, p.absmax[2] = INFINITY, p.absmax[3] = 0;
        check_values(p, tier, code.data);
    }
    for (int64_t blocks : {1, 255, 256, 257, 3000}) {
        const Bytes source = typed(randoms(blocks * 32), F32);
        const Packed p = quantized(source, F32, NF4, 32, true, tier, 2);
        const Packed scalar = quantized(source, F32, NF4, 32, true, TIER_SCALAR);
        require(same(p.codes, scalar.codes) && same(p.nested, scalar.nested), "nested scales of many groups");
        check_values(p, tier);
    }
    const Packed big = quantized(typed(randoms((2 << 20) + 2048), F32), F32, NF4, 64, false, tier, 2);
    check_values(big, tier);
}

void check_masks(int64_t tier) {
    context = std::string(TIER_NAMES[tier]) + " masks";
    for (int64_t threshold : {0, 1, 3277, 32768, 65535})
        for (int64_t k : {1, 7, 8, 16, 33, 75, 127, 128, 129, 255, 256, 257, 520, 4304})
            for (int64_t seed_of : {(int64_t)0, (int64_t)1234567890123, INT64_MAX - 1}) {
                Array<int64_t> seed(1);
                seed[0] = seed_of;
                const int64_t m = 5, bytes = (k + 7) / 8;
                Bytes mask = std::move(Bytes(m * bytes).fill(0xff));
                Args args{};
                args.m = m, args.k = k, args.tier = tier, args.threads = 2, args.threshold = threshold;
                args.stream = 65537, args.seed = seed.data, args.mask = mask.data;
                require(fl_dropout_mask(&args) == FL_OK, "dropout_mask refused");
                bool good = true;
                for (int64_t row = 0; row < m; ++row)
                    for (int64_t i = 0; i < bytes; ++i) {
                        uint8_t bits = fl_keep_bits((uint64_t)seed_of, 65537, (uint64_t)row, (uint32_t)i,
                                                    (uint32_t)threshold);
                        if (i == bytes - 1 && k % 8) bits &= (uint8_t)((1 << k % 8) - 1);
                        good = good && mask[row * bytes + i] == bits;
                    }
                require(good, "mask of " + std::to_string(k) + " columns, threshold " + std::to_string(threshold));
            }
}

// --- layers ----------------------------------------------------------------------------------------------------------

struct Mode {
    const char* name;
    int64_t flags;
};
const int64_t GRADIENTS = NEED_DX | NEED_DA | NEED_DB | NEED_DBIAS;
const Mode MODES[] = {{"lora", 0},
                      {"drop", DROPOUT | SAVE_MASK},
                      {"dora", DORA},
                      {"dora-drop", DORA | DROPOUT | SAVE_MASK},
                      {"dora-shared", DORA | DROPOUT | SHARED | SAVE_MASK}};
enum Weight { W_DENSE, W_NF4, W_NESTED, W_FP4, W_CODE, WEIGHTS };

struct Outputs {
    Bytes y, z, dx;
    Floats h, da, db, dmag, dbias;
    Bytes mask;
};

struct Layer {
    int64_t m, n, k, r, dtype, flags, tier;
    double scale = 0.75, keep = 1;
    int64_t threshold = 0, stream = 3;
    Array<int64_t> seed{1};
    Bytes x, dy, dense;
    Packed packed{NF4, 64, 0, Bytes(0), Floats(0), Bytes(0), Floats(0), Floats(1)};
    Floats a, b, bias, mag, norm, code;
    bool is_packed, own_code;
    Doubles w;

    Layer(int64_t tier_, int64_t m_, int64_t n_, int64_t k_, int64_t r_, int64_t dtype_, int64_t flags_, int weight,
          int64_t blocksize)
        : m(m_), n(n_), k(k_), r(r_), dtype(dtype_), flags(flags_), tier(tier_), x(typed(randoms(m * k), dtype)),
          dy(typed(randoms(m * n), dtype)), dense(typed(randoms(n * k, 1 / sqrt((double)k)), dtype)),
          a(randoms(r * k, 1 / sqrt((double)k))), b(randoms(n * r)), bias(randoms(n)), mag(n), norm(poison(n)),
          code(16), is_packed(weight != W_DENSE), own_code(weight == W_CODE), w((size_t)(n * k)) {
        seed[0] = 1234567890123;
        if (flags & DROPOUT) threshold = 19661, keep = 65536.0 / (65536 - 19661);
        for (int i = 0; i < 16; ++i) code[i] = fl_nf4_code[i] * 1.5f;
        for (int64_t i = 0; i < n; ++i) mag[i] = (float)(uniform() + 0.5);
        if (is_packed) {
            packed = quantized(dense, dtype, weight == W_FP4 ? FP4 : NF4, blocksize, weight == W_NESTED, TIER_SCALAR);
            const float* table = own_code ? code.data : weight == W_FP4 ? fl_fp4_code : fl_nf4_code;
            for (int64_t i = 0; i < n * k; ++i) w[(size_t)i] = table[packed.code(i)] * packed.scale(i);
        } else {
            for (int64_t i = 0; i < n * k; ++i) w[(size_t)i] = to_f32_one(dense.data, dtype, i);
        }
    }

    Args args(int64_t threads) const {
        Args args{};
        args.m = m, args.n = n, args.k = k, args.r = r, args.dtype = dtype, args.flags = flags;
        args.threads = threads, args.tier = tier, args.threshold = threshold, args.stream = stream;
        args.scale = scale, args.keep_scale = keep, args.seed = seed.data;
        if (is_packed) packed.put(args);
        else args.dense = dense.data;
        args.code = own_code ? code.data : nullptr;
        args.x = x.data, args.a = a.data, args.b = b.data;
        if (flags & DORA) args.mag = mag.data, args.norm = norm.data;
        return args;
    }

    Floats norm_of(int64_t threads) const {
        Floats out = poison(n);
        Args call = args(threads);
        call.out_scales = out.data;
        require(fl_dora_norm(&call) == FL_OK, "dora_norm refused");
        return out;
    }

    Outputs run(int64_t threads) const {
        const bool dora = flags & DORA, drop = flags & DROPOUT;
        Outputs o{poison(m * n, dtype), poison(dora ? m * n : 0, dtype), poison(m * k, dtype), poison(m * r),
                  poison(r * k), poison(n * r), poison(dora ? n : 0), poison(n), Bytes(drop ? m * ((k + 7) / 8) : 0)};
        Args call = args(threads);
        call.bias = flags & BIAS ? bias.data : nullptr;
        call.y = o.y.data, call.h = o.h.data, call.z = dora ? o.z.data : nullptr;
        call.mask = drop ? o.mask.data : nullptr;
        require(fl_lora_fwd(&call) == FL_OK, "lora_fwd refused");
        call.dy = dy.data, call.dx = o.dx.data, call.da = o.da.data, call.db = o.db.data;
        call.dmag = dora ? o.dmag.data : nullptr, call.dbias = o.dbias.data;
        call.y = nullptr, call.bias = nullptr, call.seed = nullptr;
        require(fl_lora_bwd(&call) == FL_OK, "lora_bwd refused");
        return o;
    }
};

// out[i][j] (+)= factor sum_d p(i, d) q(j, d)
template <class P, class Q>
void product(int64_t rows, int64_t columns, int64_t depth, double factor, const P& p, const Q& q, Doubles& out) {
    out.resize((size_t)(rows * columns), 0.0);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            double sum = 0;
            for (int64_t d = 0; d < depth; ++d) sum += p(i, d) * q(j, d);
            out[(size_t)(i * columns + j)] += factor * sum;
        }
}

// What a sum of many terms may lose by cancelling: 4 u |p| |q| / |sum|.
template <class P, class Q>
double cancelled(int64_t rows, int64_t columns, int64_t depth, const P& p, const Q& q, const Doubles& sum) {
    Doubles most;
    product(rows, columns, depth, 1, [&](int64_t i, int64_t d) { return fabs(p(i, d)); },
            [&](int64_t j, int64_t d) { return fabs(q(j, d)); }, most);
    double above = 0, below = 0;
    for (size_t i = 0; i < sum.size(); ++i)
        if (sum[i] == sum[i]) above += most[i] * most[i], below += sum[i] * sum[i];
    return below > 0 ? 4 * UNIT[F32] * sqrt(above / below) : 0;
}

// The equations of forward.h and backward.h in fp64.
void judge(Layer& l) {
    const int64_t m = l.m, n = l.n, k = l.k, r = l.r, bytes = (k + 7) / 8;
    const bool dora = l.flags & DORA, drop = l.flags & DROPOUT, twice = dora && drop && !(l.flags & SHARED);
    const auto at = [](const Doubles& v, int64_t i) { return v[(size_t)i]; };
    const auto w = [&](int64_t j, int64_t d) { return at(l.w, j * k + d); };
    const auto a = [&](int64_t j, int64_t d) { return (double)l.a[j * k + d]; };
    const auto b = [&](int64_t j, int64_t d) { return (double)l.b[j * r + d]; };

    Doubles merged, norm((size_t)n);
    product(n, k, r, l.scale, b, [&](int64_t j, int64_t d) { return a(d, j); }, merged);
    for (int64_t i = 0; i < n; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += (at(merged, i * k + j) + w(i, j)) * (at(merged, i * k + j) + w(i, j));
        norm[(size_t)i] = sqrt(sum), l.norm[i] = (float)sqrt(sum);
    }
    const Floats found = l.norm_of(2);
    bool good = true;
    for (int64_t i = 0; i < n; ++i) good = good && fabs(found[i] - at(norm, i)) <= 2e-6 * at(norm, i);
    require(good && same(found, l.norm_of(1)), "dora_norm");

    const Outputs o = l.run(1), again = l.run(2);
    require(same(o.y, again.y) && same(o.z, again.z) && same(o.dx, again.dx) && same(o.h, again.h) &&
                same(o.da, again.da) && same(o.db, again.db) && same(o.dmag, again.dmag) &&
                same(o.dbias, again.dbias) && same(o.mask, again.mask), "results depend on the number of threads");

    Doubles x((size_t)(m * k)), xd(x.size()), keep(x.size(), 1.0);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const size_t to = (size_t)(i * k + j);
            if (drop) {
                const uint8_t bits = fl_keep_bits((uint64_t)l.seed[0], (uint32_t)l.stream, (uint64_t)i,
                                                  (uint32_t)(j / 8), (uint32_t)l.threshold);
                keep[to] = (bits >> (j % 8)) & 1 ? l.keep : 0;
                require((o.mask[i * bytes + j / 8] >> (j % 8) & 1) == (keep[to] != 0), "mask of the layer");
            }
            x[to] = to_f32_one(l.x.data, l.dtype, i * k + j), xd[to] = keep[to] ? x[to] * keep[to] : 0;
        }
    Doubles h, y, z, plain, dropped, hb;
    const auto xd_of = [&](int64_t i, int64_t d) { return at(xd, i * k + d); };
    product(m, r, k, 1, xd_of, a, h);
    product(m, n, k, 1, [&](int64_t i, int64_t d) { return at(x, i * k + d); }, w, plain);
    if (twice) product(m, n, k, 1, xd_of, w, dropped);
    product(m, n, r, l.scale, [&](int64_t i, int64_t d) { return at(h, i * r + d); }, b, hb);
    Doubles c((size_t)n, 1.0), dy((size_t)(m * n)), dyc(dy.size()), saved(dy.size());
    y = dy, z = dy;
    for (int64_t i = 0; i < m * n; ++i) {
        const size_t to = (size_t)i, column = (size_t)(i % n);
        if (dora) c[column] = (double)l.mag[i % n] / (double)l.norm[i % n];
        z[to] = (twice ? dropped[to] : plain[to]) + hb[to];
        y[to] = twice ? plain[to] + hb[to] + (c[column] - 1) * z[to] : c[column] * z[to];
        if (l.flags & BIAS) y[to] += l.bias[i % n];
        dy[to] = to_f32_one(l.dy.data, l.dtype, i), dyc[to] = c[column] * dy[to];
        if (dora) saved[to] = to_f32_one(o.z.data, l.dtype, i);
    }
    Doubles g, ga, db, da, dx, dmag((size_t)n), dbias((size_t)n);
    const auto dyc_of = [&](int64_t i, int64_t d) { return at(dyc, i * n + d); };
    const auto b_t = [&](int64_t j, int64_t d) { return b(d, j); };
    product(m, r, n, 1, dyc_of, b_t, g);
    product(n, r, m, l.scale, [&](int64_t i, int64_t d) { return at(dyc, d * n + i); },
            [&](int64_t j, int64_t d) { return at(h, d * r + j); }, db);
    product(r, k, m, l.scale, [&](int64_t i, int64_t d) { return at(g, d * r + i); },
            [&](int64_t j, int64_t d) { return at(xd, d * k + j); }, da);
    product(m, k, n, 1, [&](int64_t i, int64_t d) { return at(twice ? dy : dyc, i * n + d); },
            [&](int64_t j, int64_t d) { return w(d, j); }, dx);
    product(m, k, r, l.scale, [&](int64_t i, int64_t d) { return at(g, i * r + d); },
            [&](int64_t j, int64_t d) { return a(d, j); }, ga);
    if (twice)
        product(m, k, n, 1, [&](int64_t i, int64_t d) { return at(dyc, i * n + d) - at(dy, i * n + d); },
                [&](int64_t j, int64_t d) { return w(d, j); }, ga);
    for (size_t i = 0; i < dx.size(); ++i) dx[i] += keep[i] * ga[i];
    for (int64_t i = 0; i < m * n; ++i) {
        dbias[(size_t)(i % n)] += dy[(size_t)i];
        if (dora) dmag[(size_t)(i % n)] += dy[(size_t)i] * saved[(size_t)i] / (double)l.norm[i % n];
    }
    const double exact = 2e-6, of_h = exact + cancelled(m, r, k, xd_of, a, h);
    double base = exact + UNIT[l.dtype];
    if (l.tier == TIER_AVX512_BF16 && l.dtype == BF16) base = 1.25 * UNIT[BF16];  // w is rounded too
    close("y", o.y.data, l.dtype, y, m, base);
    close("h", o.h.data, F32, h, m, of_h);
    close("dx", o.dx.data, l.dtype, dx, m, base);
    close("da", o.da.data, F32, da, r, exact + cancelled(m, r, n, dyc_of, b_t, g));
    close("db", o.db.data, F32, db, n, of_h);
    close("dbias", o.dbias.data, F32, dbias, n, exact);
    if (!dora) return;
    close("z", o.z.data, l.dtype, z, m, base);
    close("dmag", o.dmag.data, F32, dmag, n, exact);
}

void check_layer(int64_t tier, int64_t m, int64_t n, int64_t k, int64_t r, int64_t dtype, const Mode& mode, int weight,
                 int64_t blocksize, bool broken_input = false) {
    char text[160];
    snprintf(text, sizeof text, "%s layer m %d n %d k %d r %d %s %s weight %d blocks of %d", TIER_NAMES[tier], (int)m,
             (int)n, (int)k, (int)r, DTYPE_NAMES[dtype], mode.name, weight, (int)blocksize);
    context = text;
    state = (uint64_t)(m * 7919 + n * 104729 + k * 1299709 + r);
    const int64_t more = mode.flags & DORA ? NEED_DMAG | BIAS : weight & 1 ? BIAS : 0;
    const int64_t flags = mode.flags | TRAIN | GRADIENTS | more;
    Layer layer(tier, m, n, k, r, dtype, flags, weight, blocksize);
    if (broken_input) from_f32_one(NAN, layer.x.data, dtype, k / 2), from_f32_one(NAN, layer.dy.data, dtype, n / 2);
    judge(layer);
}

void check_layers(int64_t tier) {
    int turn = 0;  // weights and ranks take turns; every dtype and mode meets every shape
    for (int64_t k : {16, 32, 33, 48, 75, 80, 96, 100, 128, 192, 1040, 4304})
        for (int64_t m : {1, 3, 8, 17, 33, 64})
            for (int64_t dtype : {F32, BF16, F16})
                for (const Mode& mode : MODES) {
                    const bool big = k * m > 16384;  // there, one in five: fp64 is slow
                    if (++turn % 5 && big) continue;
                    const int64_t n = big ? 19 : 37, r = (int64_t[]){16, 5, 8, 1}[turn % 4];
                    check_layer(tier, m, n, k, r, dtype, mode, turn % WEIGHTS, turn % 2 ? 64 : 32);
                }
    for (int64_t m : {2, 4, 5, 7, 9, 16, 32})  // every group of tokens, blocks decoded in registers
        for (int weight = 0; weight < WEIGHTS; ++weight)
            check_layer(tier, m, 50, 256, 12, (int64_t[]){F32, BF16, F16}[m % 3], MODES[m % 5], weight, 64 << m % 3);
    for (const Mode& mode : MODES) {
        check_layer(tier, 70, 130, 256, 16, F32, mode, W_NF4, 64);    // several tiles
        check_layer(tier, 70, 130, 256, 16, BF16, mode, W_DENSE, 64);
        check_layer(tier, 530, 40, 64, 4, BF16, mode, W_NESTED, 64);  // more than a chunk of tokens
        check_layer(tier, 4, 300, 320, 0, F32, mode, W_NF4, 64);      // no adapter
    }
    for (int64_t dtype : {F32, BF16, F16}) {  // NaN: only where it came in
        check_layer(tier, 3, 40, 128, 8, dtype, MODES[0], W_NF4, 64, true);
        check_layer(tier, 40, 40, 100, 8, dtype, MODES[0], W_DENSE, 64, true);
    }
}

}  // namespace

int main(int count, char** names) {
    std::vector<int64_t> tiers;
    for (int64_t tier = 0; tier < (int64_t)(sizeof TIER_NAMES / sizeof *TIER_NAMES); ++tier) {
        bool wanted = count < 2;
        for (int i = 1; i < count; ++i) wanted = wanted || !strcmp(names[i], TIER_NAMES[tier]);
        if (wanted && fl_has_tier(tier)) tiers.push_back(tier);
        if (wanted && count > 1 && !fl_has_tier(tier)) {
            fprintf(stderr, "this CPU or this build lacks the tier %s\n", TIER_NAMES[tier]);
            return 2;
        }
    }
    if (count > 1 && (int)tiers.size() != count - 1) {
        fprintf(stderr, "known tiers: scalar avx2 avx512 avx512_bf16 neon\n");
        return 2;
    }
    for (int64_t tier : tiers) {
        const int64_t before = checks, failed = failures;
        check_formats(tier);
        check_edges(tier);
        check_masks(tier);
        check_layers(tier);
        check_grouped(tier);
        check_mixture(tier);
        printf("%s: %lld checks, %lld failed\n", TIER_NAMES[tier], (long long)(checks - before),
               (long long)(failures - failed));
        fflush(stdout);
    }
    return failures != 0;
}
