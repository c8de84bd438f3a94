// NEON is the baseline of AArch64: no target pragma, and every such CPU has it.
#include "args.h"
#define TIER fl_tier_neon
#if defined(__aarch64__) && !defined(__AARCH64EB__)
#include "vec_neon.h"
#include "tier.h"
#else
const Tier* TIER() { return nullptr; }
#endif
