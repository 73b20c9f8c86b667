// A matrix somewhere in memory.

#pragma once

#include <cstdint>

// Rows of neighbouring numbers, `stride` apart; `transposed` where what is meant is the transpose of what lies there.
template <class T>
struct Matrix {
    const T* data;
    int64_t rows, columns, stride;
    bool transposed;

    // `count` of its rows or of its columns, from `first` on.
    Matrix some_rows(int64_t first, int64_t count) const {
        return {data + first * (transposed ? 1 : stride), count, columns, stride, transposed};
    }
    Matrix some_columns(int64_t first, int64_t count) const {
        return {data + first * (transposed ? stride : 1), rows, count, stride, transposed};
    }
};

template <class T>
inline Matrix<T> matrix(const T* data, int64_t rows, int64_t columns, int64_t stride) {
    return {data, rows, columns, stride, false};
}

template <class T>
inline Matrix<T> matrix(const T* data, int64_t rows, int64_t columns) {
    return matrix(data, rows, columns, columns);
}

// The transpose of a (rows, columns) matrix as it lies.
template <class T>
inline Matrix<T> transposed(const T* data, int64_t rows, int64_t columns, int64_t stride) {
    return {data, columns, rows, stride, true};
}

template <class T>
inline Matrix<T> transposed(const T* data, int64_t rows, int64_t columns) {
    return transposed(data, rows, columns, columns);
}

// What becomes of a product: it replaces what was there, is added to it, or replaces it past the caches, where nobody
// will read it soon.
enum class Into { place, sum, memory };
