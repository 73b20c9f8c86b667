// SwiGLU's activation in dense layers and shared experts; its definition is swiglu_reference in fathom/ops/swiglu.

#include "swiglu/swiglu.h"

#include <omp.h>

namespace {

template <class T>
void swiglu(int threads, const T* gate, const T* up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < rows * size; at += size) swiglu_row(gate + at, up + at, 1.0f, out + at, size);
}

template <class T>
void swiglu_backward(int threads, const T* gate, const T* up, const T* dout, T* dgate, T* dup, int64_t rows,
                     int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < rows * size; at += size)
        swiglu_row_backward<T>(gate + at, up + at, 1.0f, dout + at, dgate + at, dup + at, nullptr, size);
}

}  // namespace

EXPORT(swiglu)
EXPORT(swiglu_backward)
