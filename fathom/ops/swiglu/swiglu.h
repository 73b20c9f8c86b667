// SwiGLU on one row, forward and backward.

#pragma once

#include "vectors.h"

// out = silu(gate)·up·weight
template <class T>
inline void swiglu_row(const T* gate, const T* up, float weight, T* out, int64_t size) {
    each(size, [&](int64_t i, int64_t n) {
        Floats g = load(gate + i, n);
        store(out + i, g * sigmoid(g) * load(up + i, n) * weight, n);
    });
}

// Gradients of gate and up; with `hidden` also the forward result again, and the weight's gradient is returned.
template <class T>
inline float swiglu_row_backward(const T* gate, const T* up, float weight, const T* dout, T* dgate, T* dup, T* hidden,
                                 int64_t size) {
    Floats dweight = {};
    each(size, [&](int64_t i, int64_t n) {
        Floats g = load(gate + i, n), u = load(up + i, n), d = load(dout + i, n);
        Floats s = sigmoid(g), silu = g * s;
        store(dgate + i, d * u * weight * (s + silu * (1.0f - s)), n);
        store(dup + i, d * silu * weight, n);
        if (hidden) {
            store(hidden + i, silu * u * weight, n);
            dweight += d * silu * u;
        }
    });
    return hidden ? sum(dweight) : 0.0f;
}
