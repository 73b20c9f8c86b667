// Matmuls of bfloat16 matrices with float32 sums, on processors with bfloat16 dot products (AVX512-BF16).
//
// The scheme is that of Goto and van de Geijn (2008, doi 10.1145/1356052.1356053): both factors are packed so that a
// tile of 12 x 32 sums, which fills the registers, reads them one after the other. One instruction multiplies pairs
// of elements, so the packed layouts consist of pairs along the inner dimension, each one 32-bit word:
//
//   right factor   panels of 32 columns, each (pairs, 32) words, zero after the last column
//   left factor    as it lies where pairs are neighbours in memory; else groups of up to 12 rows, (pairs, rows) words
//
// Float32 weights are rounded while they are packed, and sums may be accumulated into a float32 result.

#pragma once

#include "linear/matrix.h"
#include "vectors.h"

#include <algorithm>

namespace gemm {

constexpr int64_t kRows = 12, kColumns = 32;
constexpr int64_t kAhead = 16;         // rows ahead that are prefetched while others are packed
constexpr int64_t kBlock = 128 << 10;  // bytes of left factor per pass over all right panels: part of an L2 cache

inline int64_t pairs_of(int64_t size) { return (size + 1) / 2; }
inline int64_t panels_of(int64_t columns) { return (columns + kColumns - 1) / kColumns; }

// The first `count` of 16 and of 32 lanes.
inline __mmask16 mask16(int64_t count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }
inline __mmask32 mask32(int64_t count) { return count >= 32 ? 0xffffffff : count > 0 ? (1u << count) - 1 : 0; }

// ---------------------------------------------------------------------------------------- packing

template <class T>
inline void prefetch(const T* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
}

// Sixteen elements as the lower halves of words.
inline __m512i halves(const bf16* from, __mmask16 mask) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
}
inline __m512i halves(const float* from, __mmask16 mask) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, from)));
}

// Pairs of one element from each of two rows; the second row may be missing.
template <class T>
inline __m512i pairs_across(const T* first, const T* second, __mmask16 mask) {
    const __m512i low = halves(first, mask);
    return second ? _mm512_or_si512(low, _mm512_slli_epi32(halves(second, mask), 16)) : low;
}

// Sixteen pairs that are neighbours in a row of which `count` elements are left.
inline __m512i pairs_along(const bf16* from, int64_t count) { return _mm512_maskz_loadu_epi16(mask32(count), from); }
inline __m512i pairs_along(const float* from, int64_t count) {
    const __m512 low = _mm512_maskz_loadu_ps(mask16(count), from);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(mask16(count - 16), from + 16), low);
}

// Rows become columns of a square of words: first within quarters of four words, then the quarters themselves.
inline void transpose(__m512i (&row)[16]) {
    __m512i two[16];
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    // 0x88 takes the even quarters of two vectors, 0xdd the odd ones.
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(row[j], row[j + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(row[j], row[j + 4], 0xdd);
        const __m512i below_even = _mm512_shuffle_i32x4(row[j + 8], row[j + 12], 0x88);
        const __m512i below_odd = _mm512_shuffle_i32x4(row[j + 8], row[j + 12], 0xdd);
        two[j] = _mm512_shuffle_i32x4(even, below_even, 0x88);
        two[j + 4] = _mm512_shuffle_i32x4(odd, below_odd, 0x88);
        two[j + 8] = _mm512_shuffle_i32x4(even, below_even, 0xdd);
        two[j + 12] = _mm512_shuffle_i32x4(odd, below_odd, 0xdd);
    }
    std::memcpy(row, two, sizeof two);
}

// Words from one panel of the right factor to the next: a few more than it has, for panels at the same distance from a
// power of two would all fall upon the same lines of a cache.
inline int64_t panel_stride(int64_t inner) { return pairs_of(inner) * kColumns + 32; }

// The panels begin … end of the right factor, the first of them at `to` and the next `apart` words on. Rows are read
// one after the other; of a factor that lies transposed, sixteen at a time.
template <class T>
inline void pack_panels(const Matrix<T>& right, int64_t begin, int64_t end, uint32_t* to, int64_t apart) {
    const int64_t inner = right.rows, pairs = pairs_of(inner), stride = right.stride;
    const int64_t first = begin * kColumns, last = end * kColumns;
    auto place = [&](int64_t p, int64_t column) {
        return to + (column / kColumns - begin) * apart + p * kColumns + column % kColumns;
    };
    if (!right.transposed) {
        for (int64_t p = 0; p < pairs; p++) {
            const T* from = right.data + 2 * p * stride;
            const int64_t next = 2 * p + 1 < inner ? stride : 0;
            for (int64_t column = first; column < last; column += 16) {
                const __mmask16 mask = mask16(right.columns - column);
                prefetch(from + column + kAhead * stride);
                prefetch(from + column + (kAhead + 1) * stride);
                _mm512_store_si512(place(p, column),
                                   pairs_across(from + column, next ? from + column + next : nullptr, mask));
            }
        }
        return;
    }
    for (int64_t column = first; column < last; column += 16)
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512i words[16];
            for (int64_t i = 0; i < 16; i++) {
                const T* from = right.data + (column + i) * stride + 2 * p;
                words[i] = column + i < right.columns ? pairs_along(from, inner - 2 * p) : _mm512_setzero_si512();
            }
            transpose(words);
            const int64_t here = std::min<int64_t>(16, pairs - p);
            for (int64_t i = 0; i < here; i++) _mm512_store_si512(place(p + i, column), words[i]);
        }
}

// Rows of the result in groups of kRows, but the last two share the rest: a tile of few rows waits for its own sums.
struct Groups {
    explicit Groups(int64_t rows) : rows(rows), count((rows + kRows - 1) / kRows) {}
    int64_t first(int64_t group) const {
        if (group + 1 < count || group == 0) return group * kRows;
        return group == count ? rows : (rows + (group - 1) * kRows + 1) / 2;
    }
    int64_t rows, count;
};

// The groups begin … end of rows of a left factor, one behind the other: words (pairs, rows) of one that lies
// transposed, or else the rows themselves, followed by a zero where the last pair lacks an element.
inline void pack_groups(const Matrix<bf16>& left, const Groups& groups, int64_t begin, int64_t end, uint32_t* to) {
    const int64_t inner = left.columns, pairs = pairs_of(inner), first = groups.first(begin);
    if (!left.transposed) {
        for (int64_t row = first; row < groups.first(end); row++, to += pairs) {
            to[pairs - 1] = 0;
            std::memcpy(to, left.data + row * left.stride, inner * sizeof(bf16));
        }
        return;
    }
    // Four pairs' words at a time, for four times twelve are three whole vectors.
    for (int64_t p = 0; p < pairs; p += 4)
        for (int64_t group = begin; group < end; group++) {
            const int64_t at = groups.first(group), count = groups.first(group + 1) - at;
            const __mmask16 mask = mask16(count);
            __m512i words[4] = {};
            for (int64_t i = 0; i < 4 && p + i < pairs; i++) {
                const bf16* row = left.data + 2 * (p + i) * left.stride + at;
                prefetch(row + kAhead * left.stride);
                prefetch(row + (kAhead + 1) * left.stride);
                words[i] = pairs_across(row, 2 * (p + i) + 1 < inner ? row + left.stride : nullptr, mask);
            }
            uint32_t* place = to + (at - first) * pairs + p * count;
            if (count == kRows && p + 4 <= pairs) {
                const __m512i second = _mm512_alignr_epi32(words[1], words[1], 4);
                const __m512i third = _mm512_alignr_epi32(words[2], words[2], 8);
                const __m512i fourth = _mm512_alignr_epi32(words[3], words[3], 12);
                _mm512_storeu_si512(place, _mm512_mask_blend_epi32(0xf000, words[0], second));
                _mm512_storeu_si512(place + 16, _mm512_mask_blend_epi32(0xff00, second, third));
                _mm512_storeu_si512(place + 32, _mm512_mask_blend_epi32(0xfff0, third, fourth));
            } else {
                for (int64_t i = 0; i < 4 && p + i < pairs; i++)
                    _mm512_mask_storeu_epi32(place + i * count, mask, words[i]);
            }
        }
}

// ---------------------------------------------------------------------------------------- multiplying

// Rows of a left factor: where the first pair of the first row is, and bytes to the next row and to the next pair.
struct Rows {
    const char* first;
    int64_t row, pair;
};

// One row of a tile into out, of which `columns` columns are used. Masked stores of 16-bit elements are slow.
inline void finish(float* out, __m512 lower, __m512 upper, int64_t columns, Into into) {
    if (columns >= kColumns && into == Into::memory && reinterpret_cast<size_t>(out) % 64 == 0) {
        _mm512_stream_ps(out, lower);
        _mm512_stream_ps(out + 16, upper);
        return;
    }
    const __mmask16 first = mask16(columns), second = mask16(columns - 16);
    if (into == Into::sum) {
        lower += _mm512_maskz_loadu_ps(first, out);
        upper += _mm512_maskz_loadu_ps(second, out + 16);
    }
    _mm512_mask_storeu_ps(out, first, lower);
    _mm512_mask_storeu_ps(out + 16, second, upper);
}
inline void finish(bf16* out, __m512 lower, __m512 upper, int64_t columns, Into) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(upper, lower);
    if (columns >= kColumns)
        _mm512_storeu_si512(out, both);
    else
        std::memcpy(out, &both, columns * sizeof(bf16));
}

// R rows times one panel, of which `columns` columns are used; not inlined, as it uses all registers.
template <int R, class Out>
__attribute__((noinline)) void tile(Rows rows, const uint32_t* panel, int64_t pairs, Out* out, int64_t stride,
                                    int64_t columns, Into into) {
    __m512 lower_sums[R] = {}, upper_sums[R] = {};
    // An address is a register plus once or twice another one, so every third row has a register.
    const char* third[4];
    for (int i = 0; i < 4; i++) third[i] = rows.first + 3 * i * rows.row;
    for (int64_t p = 0; p < pairs; p++, panel += kColumns) {
        const __m512bh lower = (__m512bh)_mm512_load_si512(panel), upper = (__m512bh)_mm512_load_si512(panel + 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            int32_t word;
            std::memcpy(&word, third[r / 3] + r % 3 * rows.row, 4);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
            lower_sums[r] = _mm512_dpbf16_ps(lower_sums[r], pair, lower);
            upper_sums[r] = _mm512_dpbf16_ps(upper_sums[r], pair, upper);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) third[i] += rows.pair;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++, out += stride) finish(out, lower_sums[r], upper_sums[r], columns, into);
}

template <class Out, int R = kRows>
inline void tile_of(int64_t count, Rows rows, const uint32_t* panel, int64_t pairs, Out* out, int64_t stride,
                    int64_t columns, Into into) {
    if constexpr (R > 0) {
        if (count == R) return tile<R>(rows, panel, pairs, out, stride, columns, into);
        tile_of<Out, R - 1>(count, rows, panel, pairs, out, stride, columns, into);
    }
}

// Whether the left factor has to be packed.
inline bool packs(const Matrix<bf16>& left) { return left.transposed || left.columns % 2; }

// Groups that go through all panels together. A single group of very long rows would have to read every panel from far
// away, so those go through one panel after the other.
inline int64_t groups_at_once(const Groups& groups, int64_t pairs) {
    const int64_t bytes = kRows * pairs * 4;
    return bytes > kBlock / 2 ? std::max<int64_t>(1, groups.count) : kBlock / bytes;
}

// Words that `multiply` may need to pack rows of the left factor.
inline int64_t words_for(const Matrix<bf16>& left) {
    const int64_t pairs = pairs_of(left.columns);
    return packs(left) ? std::min(left.rows, groups_at_once(Groups(left.rows), pairs) * kRows) * pairs : 0;
}

// left·right into out. `space` has room for words_for.
template <class Out>
inline void multiply(Out* out, int64_t stride, int64_t columns, Into into, const Matrix<bf16>& left,
                     const uint32_t* panels, int64_t apart, uint32_t* space) {
    const Groups groups(left.rows);
    const int64_t pairs = pairs_of(left.columns), most = groups_at_once(groups, pairs);
    const bool packed = packs(left);
    for (int64_t start = 0; start < groups.count; start += most) {
        const int64_t stop = std::min(groups.count, start + most);
        auto packed_at = [&](int64_t group) { return space + (groups.first(group) - groups.first(start)) * pairs; };
        if (packed) pack_groups(left, groups, start, stop, space);
        for (int64_t panel = 0; panel < panels_of(columns); panel++)
            for (int64_t group = start; group < stop; group++) {
                const int64_t first = groups.first(group), count = groups.first(group + 1) - first;
                Rows rows{(const char*)(left.data + first * left.stride), left.stride * 2, 4};
                if (packed && left.transposed) rows = {(const char*)packed_at(group), 4, 4 * count};
                if (packed && !left.transposed) rows = {(const char*)packed_at(group), 4 * pairs, 4};
                tile_of(count, rows, panels + panel * apart, pairs, out + first * stride + panel * kColumns, stride,
                        columns - panel * kColumns, into);
            }
    }
    if (into == Into::memory) _mm_sfence();
}

}  // namespace gemm
