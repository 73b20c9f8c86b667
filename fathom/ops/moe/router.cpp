// Which experts the tokens of a batch take; defined by select_experts_reference in fathom/ops/moe/reference.py.

#include "moe/select.h"

#include <omp.h>

namespace {

// scores (N,E) -> chosen (N,K)
void select_experts(int threads, const float* scores, int64_t* chosen, int64_t tokens, int64_t experts, int64_t count,
                    int64_t groups, int64_t topk_group) {
#pragma omp parallel num_threads(threads)
    {
        ExpertSelector select(experts, count, groups, topk_group);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) select(scores + token * experts, chosen + token * count);
    }
}

}  // namespace

extern "C" {
auto* select_experts_f32 = &select_experts;
}
