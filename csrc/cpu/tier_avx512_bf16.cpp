// AVX-512 with bf16 dot products (Intel since Cooper Lake, AMD since Zen 4). See tier_avx512.cpp.
#include "args.h"
#define TIER fl_tier_avx512_bf16
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define FL_BF16
#include "vec_avx512.h"
#include "tier.h"
#else
const Tier* TIER() { return nullptr; }
#endif
