// What Python passes: one record of 8-byte fields, the same for every op. fastlora/backends/_cuda_library.py packs it
// in this order; change both together and raise FL_CUDA_ABI_VERSION.
// Letters: x[m,k] w[n,k] a[r,k] b[n,r] y[m,n]. All tensors are contiguous, on one device; 0 stands for "absent".
#ifndef FASTLORA_CUDA_ARGS_H
#define FASTLORA_CUDA_ARGS_H

#include <stdint.h>

enum { FL_CUDA_ABI_VERSION = 1 };
enum Dtype : int64_t { F32 = 0, BF16 = 1, F16 = 2 };
enum Kind : int64_t { NF4 = 1, FP4 = 2 };

struct Weight {
    int64_t kind, blocksize;
    const uint8_t* packed;
    const float* absmax;          // [blocks], or absent when nested
    const uint8_t* absmax_codes;  // [blocks], nested
    const float* nested_absmax;   // [ceil(blocks / 256)]
    const float* nested_offset;   // [1]
    const float* code;            // [16], or absent: the standard table of `kind`
};

struct Args {
    int64_t device;
    void* stream;
    int64_t m, n, k, r;
    int64_t dtype;          // of x, y, z, dy, dx; for quantize the source's, for dequantize the output's
    int64_t adapter_dtype;  // of a, b
    int64_t bias_dtype, mag_dtype;
    int64_t splits;  // of the reduction: planes are fp32 [splits, m, columns] and, for the adapter, [splits, m, r]
    double scale;
    int64_t threshold, stream_number;  // of the dropout decision
    const int64_t* seed;
    Weight weight;
    const void *x, *a, *b, *bias, *mag;
    const float* norm;
    void *y, *z;
    float *h, *planes, *adapter_planes;
    uint8_t* out_bytes;
    float* out_scales;
};

#endif
