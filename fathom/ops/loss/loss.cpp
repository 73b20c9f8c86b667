// Cross-entropy of rows of logits; its definition is in fathom/ops/loss/reference.py.

#include "vectors.h"

#include <vector>

namespace {

// In place: rows of logits become softmax − onehot(target), and losses[row] = −log softmax[target]; both are zero where
// the target is `ignore`.
template <class T>
void cross_entropy(int threads, T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t words,
                   int64_t ignore) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(words + kLanes);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            T* line = logits + row * words;
            if (targets[row] == ignore) {
                losses[row] = 0;
                std::memset(line, 0, words * sizeof(T));
                continue;
            }
            Floats best = fill(-INFINITY), total = {};
            each(words, [&](int64_t i, int64_t n) {
                Floats value = mask_tail(load(line + i, n), n, -INFINITY);
                best = value > best ? value : best;
            });
            float top = largest(best), own = to_float(line[targets[row]]);
            each(words, [&](int64_t i, int64_t n) {
                Floats power = mask_tail(exponential(load(line + i, n) - top), n, 0.0f);
                store(&powers[i], power);
                total += power;
            });
            float all = sum(total), inverse = 1.0f / all;
            losses[row] = std::log(all) + top - own;
            powers[targets[row]] -= all;
            each(words, [&](int64_t i, int64_t n) { store(line + i, load(&powers[i]) * inverse, n); });
        }
    }
}

}  // namespace

EXPORT(cross_entropy)
