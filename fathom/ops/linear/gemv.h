// Matrix-vector products for a few vectors, bound by reading the weights.
//
// Decoding multiplies every matrix with one vector per sequence. Two loops do all of it: `GemvInputs` takes dot
// products with the rows, `add_weighted_rows` weighted sums of them. The order of summation depends on neither the
// threads nor the other vectors, so results are batch-invariant, bit for bit.

#pragma once

#include "vectors.h"

#include <algorithm>
#include <vector>

// A matrix as it lies in memory, rows one after another; or the first of a stack of them. The packed formats are those
// of fathom/quantization/integer.py.
enum Format : int64_t { kFloat32, kBfloat16, kInt8, kInt4 };

struct Weight {
    const void* data;
    const void* scales;  // kInt8: a float32 for each row; kInt4: a bfloat16 for each 32 columns of a row
    int64_t format, rows, columns;

    // `count` rows of matrix `index` of a stack, from row `from` on.
    Weight part(int64_t index, int64_t from, int64_t count) const {
        Weight one = *this;
        const int64_t skipped = index * rows + from;
        const int64_t bytes[] = {4 * columns, 2 * columns, columns, columns / 2};
        one.data = static_cast<const char*>(data) + skipped * bytes[format];
        if (format == kInt8) one.scales = static_cast<const float*>(scales) + skipped;
        if (format == kInt4) one.scales = static_cast<const bf16*>(scales) + skipped * (columns / 32);
        one.rows = count;
        return one;
    }
};

namespace {

constexpr int64_t kVectors = 4;    // vectors multiplied at a time
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kColumns = 32;  // between two prefetches of a row; the group that shares a scale in kInt4
#ifdef __AVX512F__
constexpr int kSums = 16;  // running sums that fit the registers beside what is multiplied
#else
constexpr int kSums = 8;
#endif

// Into the L2 cache, which allows more lines in flight than L1 (1.4 times as fast on Zen 4).
inline void fetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Reads one vector of a row's weights at column i + place, i being a multiple of kColumns, as float32. A scale of the
// whole row is applied to its sums.
template <class T>
struct Plain {
    const T* data;
    int64_t columns;
    explicit Plain(const Weight& w) : data(static_cast<const T*>(w.data)), columns(w.columns) {}
    Floats at(int64_t row, int64_t i, int64_t place) const { return load(data + row * columns + i + place); }
    Floats some(int64_t row, int64_t i, int64_t count) const { return load(data + row * columns + i, count); }
    void prefetch(int64_t row, int64_t i) const {
        for (int64_t byte = 0; byte < int64_t(kColumns * sizeof(T)); byte += 64)
            fetch(reinterpret_cast<const char*>(data + row * columns + i) + byte);
    }
    float scale(int64_t) const { return 1.0f; }
    static constexpr bool scaled = false;
};

// A vector's worth of bytes as integers. Without intrinsics compilers widen so short a vector byte by byte.
inline Ints widened(const int8_t* from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
    Ints whole;
    for (int i = 0; i < kLanes; i++) whole[i] = from[i];
    return whole;
#endif
}

struct Int8 {
    const int8_t* data;
    const float* scales;
    int64_t columns;
    explicit Int8(const Weight& w)
        : data(static_cast<const int8_t*>(w.data)), scales(static_cast<const float*>(w.scales)), columns(w.columns) {}
    Floats at(int64_t row, int64_t i, int64_t place) const {
        return __builtin_convertvector(widened(data + row * columns + i + place), Floats);
    }
    Floats some(int64_t row, int64_t i, int64_t count) const {
        float part[kLanes] = {};
        for (int64_t j = 0; j < count; j++) part[j] = data[row * columns + i + j];
        return load(part);
    }
    void prefetch(int64_t row, int64_t i) const { fetch(data + row * columns + i); }
    float scale(int64_t row) const { return scales[row]; }
    static constexpr bool scaled = true;
};

// Four words, repeated across a vector.
inline Words broadcast4(const uint32_t* from) {
#if defined(__AVX512F__)
    return (Words)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
    return (Words)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Words words;
    for (int i = 0; i < kLanes; i++) words[i] = from[i % 4];
    return words;
#endif
}

inline Words shifts() {
    Words each;
    for (int i = 0; i < kLanes; i++) each[i] = i / 4 * 4;
    return each;
}

// 32 columns are four words. Shifting whole vectors of words brings the columns out in their order, however wide a
// vector is.
struct Int4 {
    const uint32_t* data;
    const bf16* scales;
    int64_t columns;
    explicit Int4(const Weight& w)
        : data(static_cast<const uint32_t*>(w.data)), scales(static_cast<const bf16*>(w.scales)), columns(w.columns) {}
    Floats at(int64_t row, int64_t i, int64_t place) const {
        const int64_t group = (row * columns + i) / kColumns;
        Ints whole = (Ints)((broadcast4(data + 4 * group) >> (shifts() + uint32_t(place))) & 15) - 8;
        return __builtin_convertvector(whole, Floats) * to_float(scales[group]);
    }
    Floats some(int64_t, int64_t, int64_t) const { return Floats{}; }  // there is no part of a group
    void prefetch(int64_t row, int64_t i) const { fetch(data + (row * columns + i) / 8); }
    float scale(int64_t) const { return 1.0f; }
    static constexpr bool scaled = false;
};

// y = (or +=) value
inline void put(float* y, Four value, bool add) {
    if (add) {
        Four before;
        std::memcpy(&before, y, sizeof before);
        value = before + value;
    }
    std::memcpy(y, &value, sizeof value);
}

// ys[v][row] (+)= dot(row, xs[v]) for kR rows and kV vectors. Meanwhile the rows after the next ones are prefetched.
template <int kR, int kV, class W>
inline void block(const W& weight, int64_t row, const float* const* xs, float* const* ys, bool add) {
    Floats totals[kR][kV] = {};
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
                for (int r = 0; r < kR; r++) totals[r][v] = fused(w[r], x, totals[r][v]);
            }
        }
    }
    for (; i < columns; i += kLanes) {
        const int64_t count = columns - i < kLanes ? columns - i : kLanes;
        for (int v = 0; v < kV; v++) {
            Floats x = load(xs[v] + i, count);
            for (int r = 0; r < kR; r++) totals[r][v] = fused(weight.some(row + r, i, count), x, totals[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; v++) {
        if constexpr (kR == 4) {
            Four value = sums(totals[0][v], totals[1][v], totals[2][v], totals[3][v]);
            if (W::scaled)
                for (int r = 0; r < kR; r++) value[r] *= weight.scale(row + r);
            put(ys[v] + row, value, add);
        } else {
            for (int r = 0; r < kR; r++) {
                float value = sum(totals[r][v]);
                if (W::scaled) value *= weight.scale(row + r);
                float* y = ys[v] + row + r;
                *y = add ? *y + value : value;
            }
        }
    }
}

// As many rows at once as registers allow, so that additions do not wait for one another.
template <int kV, class W>
inline void row_blocks(const W& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys,
                       bool add) {
    constexpr int together = kSums / kV < 1 ? 1 : kSums / kV > int(kRowsAtOnce) ? int(kRowsAtOnce) : kSums / kV;
    int64_t row = first;
    for (; row + together <= last; row += together) block<together, kV>(weight, row, xs, ys, add);
    for (; row < last; row++) block<1, kV>(weight, row, xs, ys, add);
}

template <class W>
void gemv_as(const W& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys,
                   int64_t vectors, bool add) {
    // A few rows stay in the L1 cache while all vectors are multiplied with them.
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

#ifdef __AVX512BF16__

// sums[lane] + the dot product of the two pairs in that lane
inline Floats add_pairs(Floats sums, Words x, Words y) {
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)y);
}

// `block` for bfloat16 rows and vectors; vectors are as long as rows, and zeros up to a multiple of kColumns. What
// follows is fetched where that was not done for other vectors already.
template <int kR, int kV>
inline void pair_block(const bf16* rows, int64_t columns, int64_t row, const bf16* const* xs, float* const* ys,
                       bool add, bool ahead) {
    Floats totals[kR][kV] = {};
    for (int64_t i = 0; i < columns; i += kColumns) {
        const __mmask32 there = columns - i < kColumns ? (1u << (columns - i)) - 1 : ~0u;
        Words w[kR];
        const bf16* from = rows + row * columns + i;
        if (ahead) {
#pragma GCC unroll 4
            for (int r = 0; r < kR; r++) fetch(from + (r + kRowsAtOnce) * columns);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kR; r++) w[r] = (Words)_mm512_maskz_loadu_epi16(there, from + r * columns);
#pragma GCC unroll 4
        for (int v = 0; v < kV; v++) {
            const Words x = (Words)_mm512_loadu_si512(xs[v] + i);
#pragma GCC unroll 4
            for (int r = 0; r < kR; r++) totals[r][v] = add_pairs(totals[r][v], w[r], x);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kV; v++) {
        if constexpr (kR == 4) {
            put(ys[v] + row, sums(totals[0][v], totals[1][v], totals[2][v], totals[3][v]), add);
        } else {
            float* y = ys[v] + row;
            *y = add ? *y + sum(totals[0][v]) : sum(totals[0][v]);
        }
    }
}

template <int kV>
inline void pair_rows(const bf16* rows, int64_t columns, int64_t first, int64_t last, const bf16* const* xs,
                      float* const* ys, bool add, bool ahead) {
    int64_t row = first;
    for (; row + kRowsAtOnce <= last; row += kRowsAtOnce)
        pair_block<kRowsAtOnce, kV>(rows, columns, row, xs, ys, add, ahead);
    for (; row < last; row++) pair_block<1, kV>(rows, columns, row, xs, ys, add, ahead);
}

inline void gemv_pairs(const Weight& weight, int64_t first, int64_t last, const bf16* const* xs, float* const* ys,
                       int64_t vectors, bool add) {
    const int64_t columns = weight.columns;
    const bf16* rows = static_cast<const bf16*>(weight.data);
    for (int64_t row = first; row < last; row += kRowsAtOnce) {
        const int64_t end = row + kRowsAtOnce < last ? row + kRowsAtOnce : last;
        for (int64_t v = 0; v < vectors; v += kVectors) {
            switch (vectors - v) {
                case 1: pair_rows<1>(rows, columns, row, end, xs + v, ys + v, add, v == 0); break;
                case 2: pair_rows<2>(rows, columns, row, end, xs + v, ys + v, add, v == 0); break;
                case 3: pair_rows<3>(rows, columns, row, end, xs + v, ys + v, add, v == 0); break;
                default: pair_rows<4>(rows, columns, row, end, xs + v, ys + v, add, v == 0);
            }
        }
    }
}

#endif

// ys[v][row] = (or +=) dot(row, xs[v]) for the rows first … last − 1, the vectors in float32.
inline void gemv_float32(const Weight& weight, int64_t first, int64_t last, const float* const* xs, float* const* ys,
                         int64_t vectors, bool add = false) {
    switch (weight.format) {
        case kFloat32: return gemv_as(Plain<float>(weight), first, last, xs, ys, vectors, add);
        case kBfloat16: return gemv_as(Plain<bf16>(weight), first, last, xs, ys, vectors, add);
        case kInt8: return gemv_as(Int8(weight), first, last, xs, ys, vectors, add);
        default: return gemv_as(Int4(weight), first, last, xs, ys, vectors, add);
    }
}

// Vectors to be multiplied with one or more matrices like `weight`. Processors with bfloat16 dot products need half the
// instructions if the vectors are rounded, too. A thread keeps only the vectors it rounded last.
class GemvInputs {
  public:
    GemvInputs(const Weight& weight, const float* const* xs, int64_t count) : xs_(xs), count_(count) {
#ifdef __AVX512BF16__
        if (weight.format != kBfloat16) return;
        static thread_local std::vector<bf16> room;
        static thread_local std::vector<const bf16*> at;
        const int64_t columns = weight.columns, stride = (columns + kColumns - 1) / kColumns * kColumns;
        if (int64_t(room.size()) < count * stride) room.resize(count * stride);
        if (int64_t(at.size()) < count) at.resize(count);
        for (int64_t v = 0; v < count; v++) {
            bf16* to = room.data() + v * stride;
            convert(xs[v], to, columns);
            std::fill(to + columns, to + stride, bf16{});
            at[v] = to;
        }
        rounded_ = at.data();
#else
        (void)weight;
#endif
    }

    // ys[v][row] = (or +=) dot(row, vector v) for the rows first … last − 1.
    void gemv(const Weight& weight, int64_t first, int64_t last, float* const* ys, bool add = false) const {
#ifdef __AVX512BF16__
        if (rounded_ && weight.format == kBfloat16) return gemv_pairs(weight, first, last, rounded_, ys, count_, add);
#endif
        gemv_float32(weight, first, last, xs_, ys, count_, add);
    }

  private:
    const float* const* xs_;
    const bf16* const* rounded_ = nullptr;
    int64_t count_;
};

template <int kV, class T>
inline void weighted_rows_block(const T* rows, int64_t stride, int64_t count, int64_t size, const float* const* weights,
                                float* const* outs) {
    each(size, [&](int64_t i, int64_t n) {
        Floats sums[kV];
        for (int v = 0; v < kV; v++) sums[v] = load(outs[v] + i, n);
        for (int64_t row = 0; row < count; row++) {
            Floats values = n == kLanes ? load(rows + row * stride + i) : load(rows + row * stride + i, n);
            for (int v = 0; v < kV; v++) sums[v] = fused(values, fill(weights[v][row]), sums[v]);
        }
        for (int v = 0; v < kV; v++) store(outs[v] + i, sums[v], n);
    });
}

// outs[v] += Σ weights[v][row]·rows[row] over `count` rows of `size` elements.
template <class T>
inline void add_weighted_rows(const T* rows, int64_t stride, int64_t count, int64_t size, const float* const* weights,
                              float* const* outs, int64_t vectors) {
    for (int64_t v = 0; v < vectors; v += kVectors) {
        switch (vectors - v) {
            case 1: weighted_rows_block<1>(rows, stride, count, size, weights + v, outs + v); break;
            case 2: weighted_rows_block<2>(rows, stride, count, size, weights + v, outs + v); break;
            case 3: weighted_rows_block<3>(rows, stride, count, size, weights + v, outs + v); break;
            default: weighted_rows_block<4>(rows, stride, count, size, weights + v, outs + v);
        }
    }
}

}  // namespace
