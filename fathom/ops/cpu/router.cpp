// Which experts a token takes; defined by select_experts_reference in fathom/ops/routing.py.

#include <cmath>
#include <cstdint>
#include <vector>

#include <omp.h>

namespace {

// Keeps the `count` largest of the scores offered to it, in falling order; of equal ones, the first.
struct Best {
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

// scores (N,E) -> chosen (N,K); a group is as good as the sum of its two best experts.
void select_experts(int threads, const float* scores, int64_t* chosen, int64_t tokens, int64_t experts, int64_t count,
                    int64_t groups, int64_t open_groups) {
    const int64_t members = experts / groups;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> values(count + open_groups);
        std::vector<int64_t> groups_taken(open_groups);
        Best best_groups{values.data(), groups_taken.data(), open_groups};
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            const float* row = scores + token * experts;
            best_groups.clear();
            for (int64_t group = 0; group < groups; group++) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t i = group * members; i < (group + 1) * members; i++) {
                    if (row[i] > first)
                        second = first, first = row[i];
                    else if (row[i] > second)
                        second = row[i];
                }
                best_groups.offer(groups > open_groups ? first + second : 0.0f, group);
            }
            Best best{values.data() + open_groups, chosen + token * count, count};
            best.clear();
            for (int64_t group : groups_taken)
                for (int64_t i = group * members; i < (group + 1) * members; i++) best.offer(row[i], i);
        }
    }
}

}  // namespace

extern "C" {
auto* select_experts_f32 = &select_experts;
}
