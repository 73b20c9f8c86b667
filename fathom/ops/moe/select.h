// Which experts a token takes; defined by select_experts_reference in fathom/ops/moe/reference.py.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// The `count` largest of the scores offered, in descending order; of equal scores, the first.
struct TopK {
    float* scores;
    int64_t* ids;
    int64_t count;

    void clear() {
        for (int64_t i = 0; i < count; i++) scores[i] = -INFINITY, ids[i] = -1;
    }
    void offer(float score, int64_t id) {
        if (!(score > scores[count - 1] || ids[count - 1] < 0)) return;
        int64_t at = count - 1;
        for (; at > 0 && (score > scores[at - 1] || ids[at - 1] < 0); at--) {
            scores[at] = scores[at - 1];
            ids[at] = ids[at - 1];
        }
        scores[at] = score;
        ids[at] = id;
    }
};

// The best experts of the best groups; a group's score is the sum of its two best experts'.
class ExpertSelector {
  public:
    ExpertSelector(int64_t experts, int64_t choices, int64_t groups, int64_t topk_group)
        : members_(experts / groups), choices_(choices), groups_(groups), topk_group_(topk_group),
          values_(choices + topk_group), taken_(topk_group) {}

    // scores (E) -> chosen (K)
    void operator()(const float* scores, int64_t* chosen) {
        TopK best_groups{values_.data(), taken_.data(), topk_group_};
        best_groups.clear();
        for (int64_t group = 0; group < groups_; group++) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t i = group * members_; i < (group + 1) * members_; i++) {
                if (scores[i] > first)
                    second = first, first = scores[i];
                else if (scores[i] > second)
                    second = scores[i];
            }
            best_groups.offer(groups_ > topk_group_ ? first + second : 0.0f, group);
        }
        TopK best{values_.data() + topk_group_, chosen, choices_};
        best.clear();
        for (int64_t group : taken_)
            for (int64_t i = group * members_; i < (group + 1) * members_; i++) best.offer(scores[i], i);
    }

  private:
    int64_t members_, choices_, groups_, topk_group_;
    std::vector<float> values_;
    std::vector<int64_t> taken_;
};

}  // namespace
