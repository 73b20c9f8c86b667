// Products of a few vectors with a matrix of weights, bound by the reading of the weights.
//
// Decoding multiplies every matrix with one vector per sequence. Two loops do all of it: `rows_times` takes dot products
// with the rows, `mix_rows` weighted sums of them. A number's order of summation depends on neither the threads nor the
// other vectors, so a sequence decodes to the same bits alone and in any company.

#pragma once

#include "vectors.h"

// A matrix as it lies in memory, rows one after another; or the first of a stack of them.
enum Format : int64_t { kFloat32, kBfloat16 };

struct Weight {
    const void* data;
    int64_t format, rows, columns;

    // `count` rows of matrix number `index` of a stack, from row `from` on.
    Weight part(int64_t index, int64_t from, int64_t count) const {
        Weight one = *this;
        one.data = static_cast<const char*>(data) + (index * rows + from) * columns * (format == kFloat32 ? 4 : 2);
        one.rows = count;
        return one;
    }
};

namespace {

constexpr int64_t kVectors = 4;    // vectors multiplied at a time
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kColumns = 32;  // between two looks at what to fetch next
#ifdef __AVX512F__
constexpr int kSums = 16;  // running sums that fit the registers beside what is multiplied
#else
constexpr int kSums = 8;
#endif

// Reads one vector of a row's weights at column i + place, i being a multiple of kColumns, as float32.
template <class T>
struct Plain {
    const T* data;
    int64_t columns;
    explicit Plain(const Weight& w) : data(static_cast<const T*>(w.data)), columns(w.columns) {}
    Floats at(int64_t row, int64_t i, int64_t place) const { return load(data + row * columns + i + place); }
    Floats some(int64_t row, int64_t i, int64_t count) const { return load(data + row * columns + i, count); }
    void prefetch(int64_t row, int64_t i) const {
        for (int64_t byte = 0; byte < int64_t(kColumns * sizeof(T)); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(data + row * columns + i) + byte);
    }
};

// ys[v][row] (+)= dot(row, xs[v]) for kR rows and kV vectors. Meanwhile the rows after the next ones are fetched.
template <int kR, int kV, class W>
inline void block(const W& weight, int64_t row, const float* const* xs, float* const* ys, bool add) {
    Floats sums[kR][kV] = {};
    const int64_t columns = weight.columns;
    int64_t i = 0;
    for (; i + kColumns <= columns; i += kColumns) {
        for (int r = 0; r < kR; r++) weight.prefetch(row + r + kRowsAtOnce, i);
#pragma GCC unroll 8
        for (int64_t place = 0; place < kColumns; place += kLanes) {
            Floats w[kR];
            for (int r = 0; r < kR; r++) w[r] = weight.at(row + r, i, place);
            for (int v = 0; v < kV; v++) {
                Floats x = load(xs[v] + i + place);
                for (int r = 0; r < kR; r++) sums[r][v] += w[r] * x;
            }
        }
    }
    for (; i < columns; i += kLanes) {
        const int64_t count = columns - i < kLanes ? columns - i : kLanes;
        for (int v = 0; v < kV; v++) {
            Floats x = load(xs[v] + i, count);
            for (int r = 0; r < kR; r++) sums[r][v] += weight.some(row + r, i, count) * x;
        }
    }
    for (int r = 0; r < kR; r++) {
        for (int v = 0; v < kV; v++) {
            float value = sum(sums[r][v]);
            float* y = ys[v] + row + r;
            *y = add ? *y + value : value;
        }
    }
}

// As many rows at once as registers allow, so that sums do not wait for one another.
template <int kV, class W>
inline void row_blocks(const W& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys, bool add) {
    constexpr int together = kSums / kV < 1 ? 1 : kSums / kV > int(kRowsAtOnce) ? int(kRowsAtOnce) : kSums / kV;
    int64_t row = first;
    for (; row + together <= last; row += together) block<together, kV>(weight, row, xs, ys, add);
    for (; row < last; row++) block<1, kV>(weight, row, xs, ys, add);
}

template <class W>
void rows_times_as(const W& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys,
                   int64_t vectors, bool add) {
    // A few rows stay in the nearest cache while all vectors pass by.
    for (int64_t row = first; row < last; row += kRowsAtOnce) {
        const int64_t end = row + kRowsAtOnce < last ? row + kRowsAtOnce : last;
        for (int64_t v = 0; v < vectors; v += kVectors) {
            switch (vectors - v) {
                case 1: row_blocks<1>(weight, row, end, xs + v, ys + v, add); break;
                case 2: row_blocks<2>(weight, row, end, xs + v, ys + v, add); break;
                case 3: row_blocks<3>(weight, row, end, xs + v, ys + v, add); break;
                default: row_blocks<4>(weight, row, end, xs + v, ys + v, add);
            }
        }
    }
}

// ys[v][row] = (or +=) dot(row, xs[v]) for the rows first … last − 1.
inline void rows_times(const Weight& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys,
                       int64_t vectors, bool add = false) {
    if (weight.format == kFloat32)
        rows_times_as(Plain<float>(weight), first, last, xs, ys, vectors, add);
    else
        rows_times_as(Plain<bf16>(weight), first, last, xs, ys, vectors, add);
}

template <int kV, class T>
inline void mix_block(const T* rows, int64_t stride, int64_t count, int64_t size, const float* const* weights,
                      float* const* outs) {
    each(size, [&](int64_t i, int64_t n) {
        Floats sums[kV];
        for (int v = 0; v < kV; v++) sums[v] = load(outs[v] + i, n);
        for (int64_t row = 0; row < count; row++) {
            Floats numbers = n == kLanes ? load(rows + row * stride + i) : load(rows + row * stride + i, n);
            for (int v = 0; v < kV; v++) sums[v] += numbers * weights[v][row];
        }
        for (int v = 0; v < kV; v++) store(outs[v] + i, sums[v], n);
    });
}

// outs[v] += Σ weights[v][row]·rows[row] over `count` rows of `size` numbers.
template <class T>
inline void mix_rows(const T* rows, int64_t stride, int64_t count, int64_t size, const float* const* weights,
                     float* const* outs, int64_t vectors) {
    for (int64_t v = 0; v < vectors; v += kVectors) {
        switch (vectors - v) {
            case 1: mix_block<1>(rows, stride, count, size, weights + v, outs + v); break;
            case 2: mix_block<2>(rows, stride, count, size, weights + v, outs + v); break;
            case 3: mix_block<3>(rows, stride, count, size, weights + v, outs + v); break;
            default: mix_block<4>(rows, stride, count, size, weights + v, outs + v);
        }
    }
}

}  // namespace
