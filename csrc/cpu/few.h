// What both directions share for a few tokens: tokens are taken in groups whose sums stay in registers, the weight is
// decoded where it is used (in registers where a tier has `Lookup`) and never becomes a tile in memory unless its shape
// is odd.
#ifndef FASTLORA_CPU_FEW_H
#define FASTLORA_CPU_FEW_H

namespace {

enum {
    FEW = W == 16 ? 32 : 2 * W,  // up to this many tokens
    GROUP = W == 16 ? 8 : 4,     // tokens in registers at once
    BLOCK_64 = 64,               // columns decoded together, all of one block of the weight
};

// Tokens in groups of nearly equal size, none above GROUP.
struct Groups {
    int64_t tokens, count;
    explicit Groups(int64_t m) : tokens(m), count(ceil_div(m, GROUP)) {}
    int64_t first(int64_t i) const { return tokens * i / count; }
    int64_t size(int64_t i) const { return first(i + 1) - first(i); }
};

// Whether the weight is decoded in registers: each row is whole blocks, and those are groups of 64 columns.
FL_INLINE bool decoded_in_registers(const Args& args) {
#ifdef FL_LOOKUP
    return args.kind != DENSE && args.blocksize >= BLOCK_64 && args.k % args.blocksize == 0;
#else
    (void)args;
    return false;
#endif
}

// Call body(Tokens<T>()) for a number of tokens T known only at run time.
template <int T>
struct Tokens {
    enum { N = T };
};
template <class Body>
FL_INLINE void with_tokens(int64_t tokens, const Body& body) {
    switch (tokens) {
        case 1:
            return body(Tokens<1>());
        case 2:
            return body(Tokens<2>());
        case 3:
            return body(Tokens<3>());
        case 4:
            return body(Tokens<4>());
        case 5:
            return body(Tokens<GROUP == 8 ? 5 : 1>());
        case 6:
            return body(Tokens<GROUP == 8 ? 6 : 1>());
        case 7:
            return body(Tokens<GROUP == 8 ? 7 : 1>());
        default:
            return body(Tokens<GROUP>());
    }
}

// sums[i] += the sum of v[i]'s lanes. May add 0 to numbers behind, up to sums[15].
template <int COUNT>
FL_INLINE void add_sums(const vf v[COUNT], float* sums) {
#ifdef FL_AVX512
    static_assert(COUNT <= 16, "one vector of sums");
    vf s[16];
    FL_UNROLL
    for (int i = 0; i < 16; ++i) s[i] = i < COUNT ? v[i < COUNT ? i : 0] : vzero();
    FL_UNROLL
    for (int i = 0; i < 16; i += 2) s[i] = vadd(_mm512_unpacklo_ps(s[i], s[i + 1]), _mm512_unpackhi_ps(s[i], s[i + 1]));
    FL_UNROLL
    for (int i = 0; i < 16; i += 4) {
        const __m512d a = _mm512_castps_pd(s[i]), b = _mm512_castps_pd(s[i + 2]);
        s[i] = vadd(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    FL_UNROLL
    for (int i = 0; i < 16; i += 8)
        s[i] = vadd(_mm512_shuffle_f32x4(s[i], s[i + 4], 0x88), _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd));
    const vf total = vadd(_mm512_shuffle_f32x4(s[0], s[8], 0x88), _mm512_shuffle_f32x4(s[0], s[8], 0xdd));
    vstore(sums, vadd(vload(sums), total));
#else
    FL_UNROLL
    for (int i = 0; i < COUNT; ++i) sums[i] += vsum(v[i]);
#endif
}

#ifdef FL_LOOKUP
// x [count] -> its even and its odd columns: of each 2 W as fp32, or of each 4 W as bf16. count is a multiple of 64.
template <bool PAIR>
static void split(const float* x, int64_t count, float* dst) {
    for (int64_t k = 0; k < count; k += 4 * W) {
        vf first[2], second[2];
        vsplit(x + k, first);
        vsplit(x + k + 2 * W, second);
        if (PAIR) {
            vstore(dst + k / 2, vpairs(first[0], second[0]));
            vstore(dst + k / 2 + W, vpairs(first[1], second[1]));
        } else {
            vstore(dst + k, first[0]);
            vstore(dst + k + W, first[1]);
            vstore(dst + k + 2 * W, second[0]);
            vstore(dst + k + 3 * W, second[1]);
        }
    }
}
#endif

// src with the mask's bits `from` .. applied, as fp32; `from` is a multiple of 8 and src may be dst.
static void keep_f32(const float* src, const uint8_t* bits, int64_t from, int64_t count, float* dst) {
    int64_t i = 0;
#ifdef FL_AVX512
    for (; i + 16 <= count; i += 16) {
        uint16_t keep;
        memcpy(&keep, bits + ((from + i) >> 3), 2);
        vstore(dst + i, _mm512_maskz_loadu_ps((__mmask16)keep, src + i));
    }
#endif
    apply_mask(src + i, bits, from + i, count - i, dst + i);
}

}  // namespace

#endif
