// The target holds for this file only: nothing compiled here may be shared with another tier (see common.h).
#include "args.h"
#define TIER fl_tier_avx2
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#include "vec_avx2.h"
#include "tier.h"
#else
const Tier* TIER() { return nullptr; }
#endif
