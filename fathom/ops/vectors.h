// SIMD vectors: loading float32 and bfloat16 as float32, storing them, exponentials.
//
// Written with the vector extensions of GCC and Clang, for whatever instructions the machine has. A vector is as wide
// as its registers: compilers do take wider ones, but then pass them through memory.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Exports a pointer to each function for float32 and for bfloat16, which Python finds by name.
#define EXPORT(NAME)                                \
    extern "C" {                                    \
    auto* NAME##_f32 = &NAME<float>;                \
    auto* NAME##_bf16 = &NAME<bf16>;                \
    }

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct bf16 {
    uint16_t bits;
};

// ---------------------------------------------------------------------------------------- reading and writing

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

inline Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Without intrinsics compilers widen a vector in halves.
inline Floats load(const bf16* from) {
#ifdef __AVX512F__
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
inline void store(bf16* to, Floats value) {
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
#else
    Words words = (Words)value;
    words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    words = value == value ? words : Words{} + 0x7fc0;
    Halves halves = __builtin_convertvector(words, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` lanes of a vector; the rest read as zero and are not written.
template <class T>
inline Floats load(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 lanes = (1u << count) - 1;
    if constexpr (sizeof(T) == 4) return (Floats)_mm512_maskz_loadu_ps(lanes, from);
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, from);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
#else
    T part[kLanes] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part);
#endif
}

template <class T>
inline void store(T* to, Floats value, int64_t count) {
    if (count == kLanes) return store(to, value);
    T part[kLanes];
    store(part, value);
    std::memcpy(to, part, count * sizeof(T));
}

// Interleaved pairs (x0, y0), (x1, y1), …, of which the first `count` are there, as two vectors; and back.
template <class T>
inline void load_pairs(const T* from, int64_t count, Floats& x, Floats& y) {
    float first[kLanes] = {}, second[kLanes] = {};
    for (int64_t i = 0; i < count; i++) first[i] = to_float(from[2 * i]), second[i] = to_float(from[2 * i + 1]);
    x = load(first);
    y = load(second);
}

template <class T>
inline void store_pairs(T* to, Floats x, Floats y, int64_t count) {
    T first[kLanes], second[kLanes];
    store(first, x);
    store(second, y);
    for (int64_t i = 0; i < count; i++) to[2 * i] = first[i], to[2 * i + 1] = second[i];
}

// A bfloat16 pair is one word: no element has to be moved.
inline void load_pairs(const bf16* from, int64_t count, Floats& x, Floats& y) {
    if (count < kLanes) return load_pairs<bf16>(from, count, x, y);
    Words words;
    std::memcpy(&words, from, sizeof words);
    x = (Floats)(words << 16);
    y = (Floats)(words & 0xffff0000u);
}

inline void store_pairs(bf16* to, Floats x, Floats y, int64_t count) {
    if (count < kLanes) return store_pairs<bf16>(to, x, y, count);
    Halves first, second;
    store(reinterpret_cast<bf16*>(&first), x);
    store(reinterpret_cast<bf16*>(&second), y);
    Words words = __builtin_convertvector(first, Words) | (__builtin_convertvector(second, Words) << 16);
    std::memcpy(to, &words, sizeof words);
}

// body(offset, count) over `size` elements: a vector at a time, then the rest.
template <class Body>
inline void each(int64_t size, Body body) {
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
    if (at < size) body(at, size - at);
}

// ---------------------------------------------------------------------------------------- arithmetic

typedef float Four __attribute__((vector_size(16)));

// a·b + c with one rounding. Left to themselves, compilers fuse some instantiations of a loop and not others (GCC
// avoids chains of fused operations on AMD's processors with 256-bit vectors), and the same sum has other bits.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// Half is added to half until one lane is left.
inline float sum(Floats value) {
    float parts[kLanes];
    store(parts, value);
    Four fours[kLanes / 4];
    std::memcpy(fours, parts, sizeof fours);
    for (int64_t half = kLanes / 8; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) fours[i] += fours[i + half];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// The sums of four vectors, each as above, to the bit.
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
#ifdef __AVX512F__
    // Quarters of two vectors beside each other: 0x44 the lower two of each, 0xee the upper; 0x88 even ones, 0xdd odd.
    const __m512 w = (__m512)a, x = (__m512)b, y = (__m512)c, z = (__m512)d;
    const __m512 ab = _mm512_shuffle_f32x4(w, x, 0x44) + _mm512_shuffle_f32x4(w, x, 0xee);
    const __m512 cd = _mm512_shuffle_f32x4(y, z, 0x44) + _mm512_shuffle_f32x4(y, z, 0xee);
    __m512 quarters = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
    quarters += _mm512_permute_ps(quarters, 0x4e);  // within each quarter the halves trade places,
    quarters += _mm512_permute_ps(quarters, 0xb1);  // then neighbours
    return (Four)_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, quarters));
#else
    return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

inline float largest(Floats value) {
    float best = value[0];
    for (int i = 1; i < kLanes; i++) best = value[i] > best ? value[i] : best;
    return best;
}

// e^x to a few units in the last place: e^x = 2^n·e^r with |r| <= ln(2)/2. Zero below -87, where floats stop being
// normal; infinite above 88; NaN stays NaN.
inline Floats exponential(Floats x) {
    const float rounder = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
    Floats n = (x * 1.44269504f + rounder) - rounder;
    Floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats p = r * 1.3888889e-3f + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    p = p * (Floats)power;
    p = x < -87.0f ? Floats{} : p;
    return x > 88.0f ? Floats{} + INFINITY : p;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

inline Floats fill(float value) { return Floats{} + value; }

// Lanes from `count` on become `value`.
inline Floats mask_tail(Floats values, int64_t count, float value) {
    Ints lanes;
    for (int i = 0; i < kLanes; i++) lanes[i] = i;
    return lanes < int32_t(count) ? values : fill(value);
}

// The same values in another type.
template <class From, class To>
inline void convert(const From* from, To* to, int64_t size) {
    each(size, [&](int64_t i, int64_t n) { store(to + i, load(from + i, n), n); });
}

}  // namespace
