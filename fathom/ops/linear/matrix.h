// A matrix somewhere in memory.

#pragma once

#include <cstdint>

// Rows of contiguous elements, `stride` apart; `transposed`: the transpose of what is stored.
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

// The transpose of a stored (rows, columns) matrix.
template <class T>
inline Matrix<T> transposed(const T* data, int64_t rows, int64_t columns, int64_t stride) {
    return {data, columns, rows, stride, true};
}

template <class T>
inline Matrix<T> transposed(const T* data, int64_t rows, int64_t columns) {
    return transposed(data, rows, columns, columns);
}

// What a matmul does with its result: overwrite the destination, add to it, or overwrite it past the caches, for
// results that are not read soon.
enum class Into { place, sum, memory };
