// Everything one tier consists of; a tier_*.cpp defines TIER, chooses a vec_*.h and includes this last.
#include "gemm.h"
#include "weight.h"
#include "quantize.h"
#include "team.h"
#include "forward.h"
#include "backward.h"
#include "norm.h"
#include "few.h"
#include "few_fwd.h"
#include "few_rows.h"
#include "few_bwd.h"
#include "grouped.h"
#include "mixture_rows.h"
#include "mixture.h"

namespace {

// bf16 pairs only where the CPU multiplies them; elsewhere everything is fp32 inside.
static bool pairs(const Args& args) { return HAS_PAIR && args.dtype == BF16; }

static int64_t forward_floats(Shared& s) {
    if (FewForward<false>::fits(s.args))
        return pairs(s.args) ? shared_floats<FewForward<HAS_PAIR>>(s) : shared_floats<FewForward<false>>(s);
    return pairs(s.args) ? shared_floats<Forward<HAS_PAIR>>(s) : shared_floats<Forward<false>>(s);
}
static void forward(Shared& s) {
    if (FewForward<false>::fits(s.args))
        return pairs(s.args) ? work<FewForward<HAS_PAIR>>(s) : work<FewForward<false>>(s);
    pairs(s.args) ? work<Forward<HAS_PAIR>>(s) : work<Forward<false>>(s);
}
static int64_t backward_floats(Shared& s) {
    if (FewBackward<false>::fits(s.args))
        return pairs(s.args) ? shared_floats<FewBackward<HAS_PAIR>>(s) : shared_floats<FewBackward<false>>(s);
    return pairs(s.args) ? shared_floats<Backward<HAS_PAIR>>(s) : shared_floats<Backward<false>>(s);
}
static void backward(Shared& s) {
    if (FewBackward<false>::fits(s.args))
        return pairs(s.args) ? work<FewBackward<HAS_PAIR>>(s) : work<FewBackward<false>>(s);
    pairs(s.args) ? work<Backward<HAS_PAIR>>(s) : work<Backward<false>>(s);
}
static int64_t norm_floats(Shared& s) { return shared_floats<Norm>(s); }
static void norm(Shared& s) { work<Norm>(s); }
static int64_t grouped_forward_floats(Shared& s) { return shared_floats<GroupedForward>(s); }
static void grouped_forward(Shared& s) { work<GroupedForward>(s); }
static int64_t grouped_backward_floats(Shared& s) { return shared_floats<GroupedBackward>(s); }
static void grouped_backward(Shared& s) { work<GroupedBackward>(s); }
static int64_t mixture_forward_floats(Shared& s) { return shared_floats<MixtureForward>(s); }
static void mixture_forward(Shared& s) { work<MixtureForward>(s); }
static int64_t mixture_backward_floats(Shared& s) { return shared_floats<MixtureBackward>(s); }
static void mixture_backward(Shared& s) { work<MixtureBackward>(s); }
static int64_t routed_forward_floats(Shared& s) { return shared_floats<RoutedForward>(s); }
static void routed_forward(Shared& s) { work<RoutedForward>(s); }
static int64_t routed_backward_floats(Shared& s) { return shared_floats<RoutedBackward>(s); }
static void routed_backward(Shared& s) { work<RoutedBackward>(s); }

static const Tier tier = {
    quantize,
    quantize_absmax,
    dequantize,
    mask_rows,
    {forward_floats, forward},
    {backward_floats, backward},
    {norm_floats, norm},
    {grouped_forward_floats, grouped_forward},
    {grouped_backward_floats, grouped_backward},
    {mixture_forward_floats, mixture_forward},
    {mixture_backward_floats, mixture_backward},
    {routed_forward_floats, routed_forward},
    {routed_backward_floats, routed_backward},
    grouped_mask,
    FEW,
};

}  // namespace

const Tier* TIER() { return &tier; }
