// The parts of a training step that lie between its matrix products, each in one pass over memory.
//
// Every function here has its definition in plain torch beside its caller in fathom/ops, against which it is tested;
// the products themselves stay torch's. Values are read as float32 or bfloat16, computed in float32, and written
// back in the type they came in. Rows are shared out over OpenMP's threads in fixed shares, so results do not change
// from run to run. No dependence on torch or Python: plain C functions over pointers, built in a few seconds.
//
// Written with the vector extensions of GCC and Clang: 16 numbers at a time, on whatever instructions the machine has.

#include <cstdint>
#include <cstring>
#include <cmath>
#include <vector>
#include <omp.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

// ---------------------------------------------------------------------------------------- reading and writing

inline float wide(float x) { return x; }

inline float wide(bf16 x) {
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

inline Floats load(const bf16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
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
    std::memcpy(to, &halves, 32);
}

// The first `count` of 16 numbers; the rest read as zero and are not written.
template <class T>
inline Floats load(const T* from, int64_t count) {
    if (count == kLanes) return load(from);
    T part[kLanes] = {};
    std::memcpy(part, from, count * sizeof(T));
    return load(part);
}

template <class T>
inline void store(T* to, Floats value, int64_t count) {
    if (count == kLanes) return store(to, value);
    T part[kLanes];
    store(part, value);
    std::memcpy(to, part, count * sizeof(T));
}

// body(offset, count) over `size` numbers: 16 at a time, then what is left.
template <class Body>
inline void each(int64_t size, Body body) {
    int64_t at = 0;
    for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
    if (at < size) body(at, size - at);
}

// ---------------------------------------------------------------------------------------- arithmetic

inline float sum(Floats value) {
    float total = 0;
    for (int i = 0; i < kLanes; i++) total += value[i];
    return total;
}

inline float largest(Floats value) {
    float best = value[0];
    for (int i = 1; i < kLanes; i++) best = value[i] > best ? value[i] : best;
    return best;
}

// e^x to a few units in the last place: e^x = 2^n·e^r with |r| <= ln(2)/2. Zero below -87, where numbers stop being
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

// The numbers from `count` on become `value`.
inline Floats keep(Floats numbers, int64_t count, float value) {
    for (int64_t i = count; i < kLanes; i++) numbers[i] = value;
    return numbers;
}

// ---------------------------------------------------------------------------------------- RMSNorm

template <class T>
void rms_norm(int threads, const T* x, int64_t stride, const float* weight, T* y, float* inverse, int64_t rows,
              int64_t size, double eps) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * stride;
        T* out = y + row * size;
        Floats squares = {};
        each(size, [&](int64_t i, int64_t n) {
            Floats value = load(in + i, n);
            squares += value * value;
        });
        float scale = 1.0f / std::sqrt(sum(squares) / float(size) + float(eps));
        inverse[row] = scale;
        each(size, [&](int64_t i, int64_t n) { store(out + i, load(in + i, n) * scale * load(weight + i, n), n); });
    }
}

// dweight holds one row per thread, zero before.
template <class T>
void rms_norm_backward(int threads, const T* x, int64_t stride, const float* weight, const float* inverse, const T* dy,
                       T* dx, float* dweight, int64_t rows, int64_t size) {
#pragma omp parallel num_threads(threads)
    {
        float* mine = dweight + omp_get_thread_num() * size;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const T *in = x + row * stride, *grad = dy + row * size;
            T* out = dx + row * size;
            float scale = inverse[row];
            Floats products = {};
            each(size, [&](int64_t i, int64_t n) {
                Floats product = load(in + i, n) * load(grad + i, n);
                products += product * load(weight + i, n);
                store(mine + i, load(mine + i, n) + product * scale, n);
            });
            float mean = sum(products) * scale * scale / float(size);
            each(size, [&](int64_t i, int64_t n) {
                store(out + i, (load(grad + i, n) * load(weight + i, n) - load(in + i, n) * mean) * scale, n);
            });
        }
    }
}

// ---------------------------------------------------------------------------------------- SwiGLU

// silu(gate)·up, times a weight per row where `weights` is given.
template <class T>
void swiglu(int threads, const T* gate, const T* up, int64_t stride, const float* weights, T* out, int64_t rows,
            int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *g = gate + row * stride, *u = up + row * stride;
        T* to = out + row * size;
        float weight = weights ? weights[row] : 1.0f;
        each(size, [&](int64_t i, int64_t n) {
            Floats value = load(g + i, n);
            store(to + i, value * sigmoid(value) * load(u + i, n) * weight, n);
        });
    }
}

// dgate and dup lie `dstride` apart from row to row. `hidden` (the forward result, remade) and `dweights` go with `weights`.
template <class T>
void swiglu_backward(int threads, const T* gate, const T* up, int64_t stride, const float* weights, const T* dout,
                     T* dgate, T* dup, int64_t dstride, T* hidden, float* dweights, int64_t rows, int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *g = gate + row * stride, *u = up + row * stride, *grad = dout + row * size;
        T *dg = dgate + row * dstride, *du = dup + row * dstride;
        float weight = weights ? weights[row] : 1.0f;
        Floats products = {};
        each(size, [&](int64_t i, int64_t n) {
            Floats value = load(g + i, n), other = load(u + i, n), d = load(grad + i, n);
            Floats s = sigmoid(value), silu = value * s;
            store(dg + i, d * other * weight * (s + silu * (1.0f - s)), n);
            store(du + i, d * silu * weight, n);
            if (hidden) {
                store(hidden + row * size + i, silu * other * weight, n);
                products += d * silu * other;
            }
        });
        if (hidden) dweights[row] = sum(products);
    }
}

// ---------------------------------------------------------------------------------------- attention

// Queries (B,S,H,P+R) with their last R numbers to be rotated, keys and values (B,S,H,P+V) side by side, one rotated key
// (B,S,R) for all heads  ->  q (B,H,S,X), k (B,H,S,X), v (B,H,S,V), X = P+R. Interleaved pairs become two halves. cos and sin
// are (B,S,J), or (S,J) when `shared`.
template <class T>
void split_heads(int threads, const T* query, const T* keyvalue, const T* key, const float* cos, const float* sin, T* q,
                 T* k, T* v, int64_t batch, int64_t length, int64_t heads, int64_t nope, int64_t rope, int64_t value,
                 int64_t shared) {
    int64_t width = nope + rope, pairs = rope / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch * length; row++) {
        int64_t b = row / length, s = row % length;
        const float *c = cos + (shared ? s : row) * pairs, *d = sin + (shared ? s : row) * pairs;
        for (int64_t h = 0; h < heads; h++) {
            const T* from = query + (row * heads + h) * width;
            const T* other = keyvalue + (row * heads + h) * (nope + value);
            int64_t to = (b * heads + h) * length + s;
            std::memcpy(q + to * width, from, nope * sizeof(T));
            std::memcpy(k + to * width, other, nope * sizeof(T));
            std::memcpy(k + to * width + nope, key + row * rope, rope * sizeof(T));
            std::memcpy(v + to * value, other + nope, value * sizeof(T));
            float even[kLanes], odd[kLanes];
            each(pairs, [&](int64_t j, int64_t n) {
                const T* pair = from + nope + 2 * j;
                for (int64_t i = 0; i < n; i++) even[i] = wide(pair[2 * i]), odd[i] = wide(pair[2 * i + 1]);
                Floats x = load(even), y = load(odd), cosine = load(c + j, n), sine = load(d + j, n);
                store(q + to * width + nope + j, x * cosine - y * sine, n);
                store(q + to * width + nope + pairs + j, y * cosine + x * sine, n);
            });
        }
    }
}

template <class T>
void split_heads_backward(int threads, const T* dq, const T* dk, const T* dv, const float* cos, const float* sin,
                          T* dquery, T* dkeyvalue, T* dkey, int64_t batch, int64_t length, int64_t heads, int64_t nope,
                          int64_t rope, int64_t value, int64_t shared) {
    int64_t width = nope + rope, pairs = rope / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> total(rope);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < batch * length; row++) {
            int64_t b = row / length, s = row % length;
            const float *c = cos + (shared ? s : row) * pairs, *d = sin + (shared ? s : row) * pairs;
            std::memset(total.data(), 0, rope * sizeof(float));
            for (int64_t h = 0; h < heads; h++) {
                int64_t from = (b * heads + h) * length + s;
                T* to = dquery + (row * heads + h) * width;
                T* other = dkeyvalue + (row * heads + h) * (nope + value);
                std::memcpy(to, dq + from * width, nope * sizeof(T));
                std::memcpy(other, dk + from * width, nope * sizeof(T));
                std::memcpy(other + nope, dv + from * value, value * sizeof(T));
                each(rope, [&](int64_t j, int64_t n) {
                    store(&total[j], load(&total[j], n) + load(dk + from * width + nope + j, n), n);
                });
                T rotated[2 * kLanes];
                each(pairs, [&](int64_t j, int64_t n) {
                    Floats x = load(dq + from * width + nope + j, n), y = load(dq + from * width + nope + pairs + j, n);
                    Floats cosine = load(c + j, n), sine = load(d + j, n);
                    store(rotated, x * cosine + y * sine);
                    store(rotated + kLanes, y * cosine - x * sine);
                    T* pair = to + nope + 2 * j;
                    for (int64_t i = 0; i < n; i++) pair[2 * i] = rotated[i], pair[2 * i + 1] = rotated[kLanes + i];
                });
            }
            each(rope, [&](int64_t j, int64_t n) { store(dkey + row * rope + j, load(&total[j], n), n); });
        }
    }
}

// (A,B,C,size) -> (A,C,B,size).
template <class T>
void swap_middle(int threads, const T* from, T* to, int64_t a, int64_t b, int64_t c, int64_t size) {
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a; i++)
        for (int64_t k = 0; k < c; k++)
            for (int64_t j = 0; j < b; j++)
                std::memcpy(to + ((i * c + k) * b + j) * size, from + ((i * b + j) * c + k) * size, size * sizeof(T));
}

// In place: rows of scores (…, rows, keys) become softmax(scale·scores) over the keys 0 … start + row, zero after.
template <class T>
void causal_softmax(int threads, T* scores, int64_t matrices, int64_t rows, int64_t keys, int64_t start, double scale) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(keys + kLanes);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < matrices * rows; row++) {
            T* line = scores + row * keys;
            int64_t seen = start + row % rows + 1;
            Floats best = fill(-INFINITY), total = {};
            each(seen, [&](int64_t i, int64_t n) {
                Floats value = keep(load(line + i, n), n, -INFINITY);
                best = value > best ? value : best;
            });
            float top = largest(best), factor = float(scale);
            each(seen, [&](int64_t i, int64_t n) {
                Floats power = keep(exponential((load(line + i, n) - top) * factor), n, 0.0f);
                store(&powers[i], power);
                total += power;
            });
            float inverse = 1.0f / sum(total);
            each(seen, [&](int64_t i, int64_t n) { store(line + i, load(&powers[i]) * inverse, n); });
            std::memset(line + seen, 0, (keys - seen) * sizeof(T));
        }
    }
}

// In place: the probabilities' gradients become scale·p·(dp − Σ p·dp), the scores' gradients.
template <class T>
void causal_softmax_backward(int threads, const T* probs, T* grads, int64_t matrices, int64_t rows, int64_t keys,
                             int64_t start, double scale) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < matrices * rows; row++) {
        const T* p = probs + row * keys;
        T* d = grads + row * keys;
        int64_t seen = start + row % rows + 1;
        Floats products = {};
        each(seen, [&](int64_t i, int64_t n) { products += load(p + i, n) * load(d + i, n); });
        float total = sum(products), factor = float(scale);
        each(seen, [&](int64_t i, int64_t n) {
            store(d + i, load(p + i, n) * (load(d + i, n) - total) * factor, n);
        });
        std::memset(d + seen, 0, (keys - seen) * sizeof(T));
    }
}

// ---------------------------------------------------------------------------------------- routed rows

// Row r of `out` is row index[r] of x, or zeros where index[r] is -1.
template <class T>
void gather_rows(int threads, const T* x, const int64_t* index, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        if (index[row] < 0)
            std::memset(out + row * size, 0, size * sizeof(T));
        else
            std::memcpy(out + row * size, x + index[row] * size, size * sizeof(T));
    }
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

// ---------------------------------------------------------------------------------------- cross-entropy

// In place: rows of logits become softmax − onehot(target), and losses[row] = −log softmax[target]; both are zero where
// the target is `ignore`.
template <class T>
void cross_entropy(int threads, T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t words,
                   int64_t ignore) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(words + kLanes);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            T* line = logits + row * words;
            if (targets[row] == ignore) {
                losses[row] = 0;
                std::memset(line, 0, words * sizeof(T));
                continue;
            }
            Floats best = fill(-INFINITY), total = {};
            each(words, [&](int64_t i, int64_t n) {
                Floats value = keep(load(line + i, n), n, -INFINITY);
                best = value > best ? value : best;
            });
            float top = largest(best), own = wide(line[targets[row]]);
            each(words, [&](int64_t i, int64_t n) {
                Floats power = keep(exponential(load(line + i, n) - top), n, 0.0f);
                store(&powers[i], power);
                total += power;
            });
            float all = sum(total), inverse = 1.0f / all;
            losses[row] = std::log(all) + top - own;
            powers[targets[row]] -= all;
            each(words, [&](int64_t i, int64_t n) { store(line + i, load(&powers[i]) * inverse, n); });
        }
    }
}

}  // namespace

// What Python finds by name: a pointer to each function, for float32 and for bfloat16.
#define EXPORT(NAME)                  \
    auto* NAME##_f32 = &NAME<float>;  \
    auto* NAME##_bf16 = &NAME<bf16>;

extern "C" {
EXPORT(rms_norm)
EXPORT(rms_norm_backward)
EXPORT(swiglu)
EXPORT(swiglu_backward)
EXPORT(split_heads)
EXPORT(split_heads_backward)
EXPORT(swap_middle)
EXPORT(causal_softmax)
EXPORT(causal_softmax_backward)
EXPORT(gather_rows)
EXPORT(sum_rows)
EXPORT(cross_entropy)
}
