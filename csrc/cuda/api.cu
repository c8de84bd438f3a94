// The C ABI: one function an op, each starts its kernels on the stream it is given and returns CUDA's status.
#include "args.h"
#include "finish.h"
#include "format.h"
#include "skinny.h"
#include "transposed.h"

#define FL_API extern "C" __attribute__((visibility("default")))

#ifndef FL_ARCHES
#define FL_ARCHES ""
#endif

#ifdef __CUDACC__
// Of the runtime linked in here: it has a current device of its own.
static int64_t use_device(const Args& args) { return (int64_t)cudaSetDevice((int)args.device); }
FL_API const char* fl_cuda_error(int64_t status) { return cudaGetErrorString((cudaError_t)status); }
#else
static int64_t use_device(const Args&) { return 0; }
FL_API const char* fl_cuda_error(int64_t status) {
    switch (status) {
        case emulator::DEADLOCK: return "threads wait for one another for ever";
        case emulator::OUTSIDE: return "an access outside every tensor";
        case emulator::MISALIGNED: return "a misaligned access";
        case emulator::SHARED_TOO_LARGE: return "too much shared memory";
        default: return "no error";
    }
}
// For tests. Threads of a block run in descending order.
FL_API void fl_emulator_descending(int64_t on) { emulator::descending = on != 0; }
// From now on counts how often each byte of a tensor is written.
FL_API void fl_emulator_watch(void* base, int64_t bytes, uint8_t* counts) {
    emulator::watched.push_back({(char*)base, bytes, counts});
}
FL_API void fl_emulator_forget() { emulator::watched.clear(); }
// Device functions one by one.
FL_API float fl_emulator_widen(int64_t bits, int64_t dtype) { return widen((uint16_t)bits, dtype); }
FL_API int64_t fl_emulator_narrow(float v, int64_t dtype) { return narrow(v, dtype); }
#endif

FL_API int64_t fl_cuda_abi_version() { return FL_CUDA_ABI_VERSION; }
FL_API int64_t fl_cuda_args_bytes() { return (int64_t)sizeof(Args); }
// What the library was compiled for, as setup.py named it: "80,86,89,90a,100,100ptx"; "" for the emulator.
FL_API const char* fl_cuda_arches() { return FL_ARCHES; }

// args: x [k] elements of dtype, weight.kind, blocksize -> out_bytes, out_scales.
FL_API int64_t fl_cuda_quantize(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const int64_t blocks = ceil_div(args->k, args->weight.blocksize);
    const int64_t warps = QUANTIZE_THREADS / LANES_OF_WARP;
    return launch(quantize_kernel, dim3((unsigned)ceil_div(blocks, warps)), QUANTIZE_THREADS, args->stream, *args);
}

// args: x fp32 [k] scales, weight.nested_offset -> out_bytes [k], out_scales [ceil(k / 256)].
FL_API int64_t fl_cuda_quantize_absmax(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const int64_t groups = ceil_div(args->k, NESTED_BLOCKSIZE);
    return launch(quantize_absmax_kernel, dim3((unsigned)groups), NESTED_BLOCKSIZE, args->stream, *args);
}

// args: weight of k elements, dtype -> y.
FL_API int64_t fl_cuda_dequantize(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const int64_t programs = ceil_div(args->k, FORMAT_THREADS * FORMAT_STEPS * 8);
    return launch(dequantize_kernel, dim3((unsigned)programs), FORMAT_THREADS, args->stream, *args);
}

// args: weight [n,k], a, b, scale, mag and norm or neither, dtype -> y [n,k].
FL_API int64_t fl_cuda_merge(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const dim3 grid((unsigned)ceil_div(args->k, MERGE_COLS), (unsigned)ceil_div(args->n, MERGE_ROWS));
    return launch(merge_kernel, grid, MERGE_THREADS, args->stream, *args);
}

// args: weight [n,k], a, b, scale -> out_scales [n].
FL_API int64_t fl_cuda_norm(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    return launch(norm_kernel, dim3((unsigned)ceil_div(args->n, MERGE_ROWS)), MERGE_THREADS, args->stream, *args);
}

// args: m, k, seed, stream_number, threshold -> out_bytes [m, ceil(k/8)].
FL_API int64_t fl_cuda_dropout_mask(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const int64_t programs = ceil_div(args->m * ceil_div(args->k, 8), FORMAT_THREADS);
    return launch(dropout_mask_kernel, dim3((unsigned)programs), FORMAT_THREADS, args->stream, *args);
}

static Finish finish_of(const Args& args, int64_t cols, const void* factor, bool transposed) {
    const float keep_scale = args.seed ? 65536.0f / (float)(65536 - args.threshold) : 1.0f;
    return {cols, factor, transposed, keep_scale};
}

// args: x [m,k], weight [n,k], a, b, scale, mag and norm or neither, bias or not, seed (dropout) or not -> y [m,n]; z,
// h and out_bytes (the mask) where given. planes, adapter_planes: scratch.
FL_API int64_t fl_cuda_forward(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    const int64_t status = args->dtype == BF16   ? launch_skinny<Bf16Type>(*args)
                           : args->dtype == F16 ? launch_skinny<F16Type>(*args)
                                                : launch_skinny<F32Type>(*args);
    if (status) return status;
    return launch_finish(*args, finish_of(*args, args->n, args->b, false));
}

// args: x = dy [m,n], weight [n,k], a, b, scale, mag and norm or neither -> y = dx [m,k]. No dropout.
FL_API int64_t fl_cuda_dx(const Args* args) {
    if (const int64_t status = use_device(*args)) return status;
    if (const int64_t status = launch_transposed(*args)) return status;
    Args rest = *args;
    rest.mag = nullptr;
    return launch_finish(rest, finish_of(*args, args->k, args->a, true));
}
