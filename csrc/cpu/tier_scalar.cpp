// Any CPU. No target pragma: the compiler's baseline.
#include "vec_generic.h"
#define TIER fl_tier_scalar
#include "tier.h"
