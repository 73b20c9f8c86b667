// RMSNorm; its definition is rms_norm_reference in fathom/ops/norm/reference.py.

#include "vectors.h"

#include <omp.h>

namespace {

template <class T>
void rms_norm(int threads, const T* x, int64_t stride, const float* weight, T* y, float* inverse, int64_t rows,
              int64_t size, double eps) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * stride;
        T* out = y + row * size;
        Floats squares = {};
        each(size, [&](int64_t i, int64_t n) {
            Floats value = load(in + i, n);
            squares += value * value;
        });
        float scale = 1.0f / std::sqrt(sum(squares) / float(size) + float(eps));
        inverse[row] = scale;
        each(size, [&](int64_t i, int64_t n) { store(out + i, load(in + i, n) * scale * load(weight + i, n), n); });
    }
}

// dweight holds one row per thread, zero before.
template <class T>
void rms_norm_backward(int threads, const T* x, int64_t stride, const float* weight, const float* inverse, const T* dy,
                       T* dx, float* dweight, int64_t rows, int64_t size) {
#pragma omp parallel num_threads(threads)
    {
        float* mine = dweight + omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const T *in = x + row * stride, *grad = dy + row * size;
            T* out = dx + row * size;
            float scale = inverse[row];
            Floats weighted = {};
            each(size, [&](int64_t i, int64_t n) {
                Floats scaled = load(in + i, n) * load(grad + i, n);
                weighted += scaled * load(weight + i, n);
                store(mine + i, load(mine + i, n) + scaled * scale, n);
            });
            float mean = sum(weighted) * scale * scale / float(size);
            each(size, [&](int64_t i, int64_t n) {
                store(out + i, (load(grad + i, n) * load(weight + i, n) - load(in + i, n) * mean) * scale, n);
            });
        }
    }
}

}  // namespace

EXPORT(rms_norm)
EXPORT(rms_norm_backward)
