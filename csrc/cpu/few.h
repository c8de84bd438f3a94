// What both directions share for a few tokens: tokens are taken in groups whose sums stay in registers, the weight is
// decoded where it is used (AVX-512: in registers) and never becomes a tile in memory unless its shape is odd.
#ifndef FASTLORA_CPU_FEW_H
#define FASTLORA_CPU_FEW_H

namespace {

enum {
    FEW = W == 16 ? 32 : 8,   // up to this many tokens
    GROUP = W == 16 ? 8 : 4,  // tokens in registers at once
    BLOCK_64 = 64,            // columns decoded together: a multiple of them, inside one block of the weight
};

// Tokens in groups of nearly equal size, none above GROUP.
struct Groups {
    int64_t tokens, count;
    explicit Groups(int64_t m) : tokens(m), count(ceil_div(m, GROUP)) {}
    int64_t first(int64_t i) const { return tokens * i / count; }
    int64_t size(int64_t i) const { return first(i + 1) - first(i); }
};

// Whether each row of a packed weight is whole blocks of whole groups of 64 columns.
FL_INLINE bool whole_blocks(const Args& args) {
    return args.kind != DENSE && args.blocksize >= BLOCK_64 && args.k % args.blocksize == 0;
}

// Call body(std::integral_constant-like tag) for a number of tokens known only at run time.
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
