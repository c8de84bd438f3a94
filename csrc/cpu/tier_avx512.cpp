// The target holds for this file only: nothing compiled here may be shared with another tier (see common.h).
#include "args.h"
#define TIER fl_tier_avx512
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#include "vec_avx512.h"
#include "tier.h"
#else
const Tier* TIER() { return nullptr; }
#endif
