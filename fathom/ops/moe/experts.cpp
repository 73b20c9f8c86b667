// The routed experts of one layer: gather an expert's tokens, gate and up, SwiGLU, down, an expert at a time.
//
// Defined by routed_experts_reference in fathom/ops/moe/reference.py; permute.py explains the order of the rows. A
// thread takes a whole expert: its tokens, activations and weights stay in that thread's cache between the matmuls,
// float32 weights are rounded as they are packed, and their gradients are float32.

#include "linear/matmul.h"
#include "swiglu/swiglu.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include <omp.h>

namespace {

struct Sizes {
    int64_t experts, hidden, width;
};

template <class T>
inline void gather(const T* x, const int64_t* token, T* out, int64_t rows, int64_t size) {
    for (int64_t row = 0; row < rows; row++) {
        if (token[row] < 0)
            std::memset(out + row * size, 0, size * sizeof(T));
        else
            std::memcpy(out + row * size, x + token[row] * size, size * sizeof(T));
    }
}

// The experts with most rows first: a thread that took one of those last would keep the others waiting.
inline std::vector<int32_t> by_load(const int32_t* ends, int64_t experts) {
    std::vector<int32_t> order(experts);
    std::iota(order.begin(), order.end(), 0);
    auto rows = [&](int32_t e) { return ends[e] - (e ? ends[e - 1] : 0); };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rows(a) > rows(b); });
    return order;
}

template <class T, class Weight>
void forward(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
             const Weight* gate_up, const Weight* down, T* before, T* y, Sizes sizes) {
    const int64_t experts = sizes.experts, d = sizes.hidden, f = sizes.width;
    const int64_t g = 2 * f;
    const std::vector<int32_t> order = by_load(ends, experts);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t place = 0; place < experts; place++) {
        const int64_t e = order[place], start = e ? ends[e - 1] : 0, rows = ends[e] - start;
        if (!rows) continue;
        T *tokens = scratch<T>(0, rows * d), *hidden = scratch<T>(1, rows * f);
        gather(x, token + start, tokens, rows, d);
        multiply(before + start * g, g, g, matrix(tokens, rows, d), Right<T>(transposed(gate_up + e * g * d, g, d)));
        for (int64_t row = 0; row < rows; row++) {
            const T* in = before + (start + row) * g;
            swiglu_row(in, in + f, weight[start + row], hidden + row * f, f);
        }
        multiply(y + start * d, d, d, matrix(hidden, rows, f), Right<T>(transposed(down + e * d * f, d, f)));
    }
}

// `dgate_up` and `ddown` are null where the weights are frozen.
template <class T, class Weight>
void backward(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
              const Weight* gate_up, const Weight* down, const T* before, const T* dout, T* dx, float* dweight,
              Weight* dgate_up, Weight* ddown, Sizes sizes) {
    const int64_t experts = sizes.experts, d = sizes.hidden, f = sizes.width;
    const int64_t g = 2 * f;
    const std::vector<int32_t> order = by_load(ends, experts);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t place = 0; place < experts; place++) {
        const int64_t e = order[place], start = e ? ends[e - 1] : 0, rows = ends[e] - start;
        if (!rows) {
            if (dgate_up) std::memset(dgate_up + e * g * d, 0, g * d * sizeof(Weight));
            if (ddown) std::memset(ddown + e * d * f, 0, d * f * sizeof(Weight));
            continue;
        }
        T *tokens = scratch<T>(0, rows * d), *hidden = scratch<T>(1, rows * f), *dy = scratch<T>(2, rows * d);
        T *dhidden = scratch<T>(3, rows * f), *dbefore = scratch<T>(4, rows * g);
        gather(dout, token + start, dy, rows, d);
        multiply(dhidden, f, f, matrix(dy, rows, d), Right<T>(matrix(down + e * d * f, d, f)));
        for (int64_t row = 0; row < rows; row++) {
            const T* in = before + (start + row) * g;
            T* to = dbefore + row * g;
            dweight[start + row] = swiglu_row_backward(in, in + f, weight[start + row], dhidden + row * f, to, to + f,
                                                       hidden + row * f, f);
        }
        if (ddown)
            multiply(ddown + e * d * f, f, f, transposed(dy, rows, d), Right<T>(matrix(hidden, rows, f)), Into::memory);
        multiply(dx + start * d, d, d, matrix(dbefore, rows, g), Right<T>(matrix(gate_up + e * g * d, g, d)));
        if (!dgate_up) continue;
        gather(x, token + start, tokens, rows, d);
        multiply(dgate_up + e * g * d, d, d, transposed(dbefore, rows, g), Right<T>(matrix(tokens, rows, d)),
                 Into::memory);
    }
}

// `masters`: the weights and their gradients are float32, whatever T is.
template <class T>
void routed_experts(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
                    const void* gate_up, const void* down, T* before, T* y, int64_t experts, int64_t d, int64_t f,
                    int64_t masters) {
    auto run = [&](auto weights) {
        using Weight = decltype(weights);
        forward<T>(threads, x, token, weight, ends, (const Weight*)gate_up, (const Weight*)down, before, y,
                   {experts, d, f});
    };
    masters ? run(float{}) : run(T{});
}

template <class T>
void routed_experts_backward(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
                             const void* gate_up, const void* down, const T* before, const T* dout, T* dx,
                             float* dweight, void* dgate_up, void* ddown, int64_t experts, int64_t d, int64_t f,
                             int64_t masters) {
    auto run = [&](auto weights) {
        using Weight = decltype(weights);
        backward<T>(threads, x, token, weight, ends, (const Weight*)gate_up, (const Weight*)down, before, dout, dx,
                    dweight, (Weight*)dgate_up, (Weight*)ddown, {experts, d, f});
    };
    masters ? run(float{}) : run(T{});
}

// Row n of `out` is the sum of the rows index[n, 0 … count) of y; an index of −1 adds nothing.
template <class T>
void combine(int threads, const T* y, const int64_t* index, T* out, int64_t rows, int64_t count, int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        each(size, [&](int64_t i, int64_t n) {
            Floats total = {};
            for (int64_t k = 0; k < count; k++) {
                const int64_t from = index[row * count + k];
                if (from >= 0) total += load(y + from * size + i, n);
            }
            store(out + row * size + i, total, n);
        });
}

}  // namespace

EXPORT(routed_experts)
EXPORT(routed_experts_backward)
EXPORT(combine)
