// The few words of CUDA that the kernels use. nvcc compiles them as they are; any other compiler gets emulate.h, which
// runs the same kernels on the CPU, so that indexing, synchronisation and arithmetic are tested without a GPU.
#ifndef FASTLORA_CUDA_PLATFORM_H
#define FASTLORA_CUDA_PLATFORM_H

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define FL_DEVICE static __device__ __forceinline__
#define FL_BOTH static __host__ __device__ __forceinline__
#define FL_TABLE static __device__ const
#define FL_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FL_SHARED(type, name) __shared__ type name
#define FL_ARGS const __grid_constant__  // its address may be passed on without a copy
#define FL_NOINLINE static __device__ __noinline__
#define FL_UNROLL _Pragma("unroll")

FL_DEVICE void barrier() { __syncthreads(); }
FL_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FL_DEVICE uint32_t shuffle_xor(uint32_t v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
FL_DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// Each nibble of the selector, 0 to 7, names a byte of a (0 to 3) or b.
FL_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t out;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}
// d += a b: a [16 x 16] by rows, b [16 x 8] by columns, 16-bit numbers, fp32 sums. Lane 4 g + t holds of a the columns
// 2t, 2t+1 of rows g and g + 8, then columns 2t+8, 2t+9 of both; of b the rows 2t, 2t+1, then 2t+8, 2t+9 of column g;
// of d the columns 2t, 2t+1 of row g, then of row g + 8. Source: PTX ISA, "mma.m16n8k16".
template <class T>
FL_DEVICE void matrix_product(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    if (T::is_bf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

template <class T>
FL_DEVICE T load(const void* p) {
    return *(const T*)p;
}
template <class T>
FL_DEVICE void store(void* p, T value) {
    *(T*)p = value;
}

template <class... P, class... A>
static int64_t launch(void (*kernel)(P...), dim3 grid, int threads, void* stream, A... args) {
    kernel<<<grid, threads, 0, (cudaStream_t)stream>>>(args...);
    return (int64_t)cudaGetLastError();
}

#else
#include "emulate.h"
#endif

FL_BOTH int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FL_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#endif
