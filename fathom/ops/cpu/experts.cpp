// The routed experts of one layer: gather an expert's tokens, gate and up, SwiGLU, down, an expert at a time.
//
// Defined by routed_experts_reference in fathom/ops/experts.py, which also explains the order of the rows. A thread
// takes a whole expert: its tokens, activations and weights stay in that thread's cache between the products, weights
// kept in float32 are narrowed on the way in and their gradients widened on the way out.

#include "products.h"
#include "swiglu.h"

#include <type_traits>

#include <omp.h>

namespace {

struct Sizes {
    int64_t experts, hidden, width;
};

// The weights in T: as they are, or narrowed into `space`.
template <class T, class Weight>
inline const T* narrowed(const Weight* weights, T* space, int64_t size) {
    if constexpr (std::is_same_v<T, Weight>) return weights;
    convert(weights, space, size);
    return space;
}

// grad = leftᵀ·right of (rows, m) and (rows, n), in the weights' type; `space` takes the product where that is wider.
template <class T, class Weight>
inline void weight_gradient(Weight* grad, const T* left, const T* right, int64_t rows, int64_t m, int64_t n, T* space) {
    if constexpr (std::is_same_v<T, Weight>) {
        multiply<T>({grad, m, n}, Transposed<T>(left, rows, m), {right, rows, n});
    } else {
        multiply<T>({space, m, n}, Transposed<T>(left, rows, m), {right, rows, n});
        convert(space, grad, m * n);
    }
}

template <class T>
inline void gather(const T* x, const int64_t* token, T* out, int64_t rows, int64_t size) {
    for (int64_t row = 0; row < rows; row++) {
        if (token[row] < 0)
            std::memset(out + row * size, 0, size * sizeof(T));
        else
            std::memcpy(out + row * size, x + token[row] * size, size * sizeof(T));
    }
}

template <class T, class Weight>
void forward(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
             const Weight* gate_up, const Weight* down, T* before, T* y, Sizes sizes) {
    auto [experts, d, f] = sizes;
    const int64_t g = 2 * f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t e = 0; e < experts; e++) {
        const int64_t start = e ? ends[e - 1] : 0, rows = ends[e] - start;
        if (!rows) continue;
        T *tokens = scratch<T>(0, rows * d), *hidden = scratch<T>(1, rows * f), *space = scratch<T>(2, g * d);
        gather(x, token + start, tokens, rows, d);
        const T* up = narrowed(gate_up + e * g * d, space, g * d);
        multiply<T>({before + start * g, rows, g}, {tokens, rows, d}, Transposed<T>(up, g, d));
        for (int64_t row = 0; row < rows; row++) {
            const T* in = before + (start + row) * g;
            swiglu_row(in, in + f, weight[start + row], hidden + row * f, f);
        }
        const T* back = narrowed(down + e * d * f, space, d * f);
        multiply<T>({y + start * d, rows, d}, {hidden, rows, f}, Transposed<T>(back, d, f));
    }
}

template <class T, class Weight>
void backward(int threads, const T* x, const int64_t* token, const float* weight, const int32_t* ends,
              const Weight* gate_up, const Weight* down, const T* before, const T* dout, T* dx, float* dweight,
              Weight* dgate_up, Weight* ddown, Sizes sizes) {
    auto [experts, d, f] = sizes;
    const int64_t g = 2 * f;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t e = 0; e < experts; e++) {
        const int64_t start = e ? ends[e - 1] : 0, rows = ends[e] - start;
        if (!rows) {
            std::memset(dgate_up + e * g * d, 0, g * d * sizeof(Weight));
            std::memset(ddown + e * d * f, 0, d * f * sizeof(Weight));
            continue;
        }
        T *tokens = scratch<T>(0, rows * d), *hidden = scratch<T>(1, rows * f), *space = scratch<T>(2, g * d);
        T *dy = scratch<T>(3, rows * d), *dhidden = scratch<T>(4, rows * f), *dbefore = scratch<T>(5, rows * g);
        gather(dout, token + start, dy, rows, d);
        multiply<T>({dhidden, rows, f}, {dy, rows, d}, {narrowed(down + e * d * f, space, d * f), d, f});
        for (int64_t row = 0; row < rows; row++) {
            const T* in = before + (start + row) * g;
            T* to = dbefore + row * g;
            dweight[start + row] = swiglu_row_backward(in, in + f, weight[start + row], dhidden + row * f, to, to + f,
                                                       hidden + row * f, f);
        }
        weight_gradient(ddown + e * d * f, dy, hidden, rows, d, f, space);
        multiply<T>({dx + start * d, rows, d}, {dbefore, rows, g},
                    {narrowed(gate_up + e * g * d, space, g * d), g, d});
        gather(x, token + start, tokens, rows, d);
        weight_gradient(dgate_up + e * g * d, dbefore, tokens, rows, g, d, space);
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

// Row n of `out` is the sum of the rows index[n, 0 … count) of y.
template <class T>
void sum_rows(int threads, const T* y, const int64_t* index, T* out, int64_t rows, int64_t count, int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        each(size, [&](int64_t i, int64_t n) {
            Floats total = {};
            for (int64_t k = 0; k < count; k++) total += load(y + index[row * count + k] * size + i, n);
            store(out + row * size + i, total, n);
        });
}

}  // namespace

EXPORT(routed_experts)
EXPORT(routed_experts_backward)
EXPORT(sum_rows)
