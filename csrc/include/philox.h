// Philox4x32-10 and fastlora's dropout decision, for C++ and CUDA alike. The specification is fastlora/math/philox.py:
//   key = (seed low, seed high), counter = (column >> 3, row low, row high, stream);
//   16-bit half (j & 1) of word (j >> 1), low half first, decides column 8 * (column >> 3) + j;
//   keep where the half is at least the threshold.
// Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11.
#ifndef FASTLORA_PHILOX_H
#define FASTLORA_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define FL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FL_HOST_DEVICE inline
#endif

enum : uint32_t {
    FL_PHILOX_M0 = 0xD2511F53u,
    FL_PHILOX_M1 = 0xCD9E8D57u,
    FL_PHILOX_W0 = 0x9E3779B9u,
    FL_PHILOX_W1 = 0xBB67AE85u,
};

// counter[4] becomes the four random words.
static FL_HOST_DEVICE void fl_philox4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = (uint64_t)FL_PHILOX_M0 * counter[0];
        const uint64_t p1 = (uint64_t)FL_PHILOX_M1 * counter[2];
        const uint32_t c1 = counter[1], c3 = counter[3];
        counter[0] = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
        counter[1] = (uint32_t)p1;
        counter[2] = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        counter[3] = (uint32_t)p0;
        key0 += FL_PHILOX_W0;
        key1 += FL_PHILOX_W1;
    }
}

// The keep bits of columns 8 * group .. 8 * group + 7 of a row, least significant bit first.
static FL_HOST_DEVICE uint8_t fl_keep_bits(uint64_t seed, uint32_t stream, uint64_t row, uint32_t group,
                                           uint32_t threshold) {
    uint32_t words[4] = {group, (uint32_t)row, (uint32_t)(row >> 32), stream};
    fl_philox4x32_10(words, (uint32_t)seed, (uint32_t)(seed >> 32));
    uint8_t bits = 0;
    for (int j = 0; j < 8; ++j) {
        const uint32_t half = (words[j >> 1] >> (16 * (j & 1))) & 0xffffu;
        bits |= (uint8_t)((half >= threshold) << j);
    }
    return bits;
}

#endif
