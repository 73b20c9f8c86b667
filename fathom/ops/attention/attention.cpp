// Latent attention in its expanded form, forward and backward: a thread takes one head of one sequence at a time.
//
// Defined by expanded_attention_reference in fathom/ops/attention. Queries go through in blocks that skip the keys
// after them; a block's scores stay in the thread's cache from product to softmax to product. The backward pass reads
// the probabilities again where the caller gave room to keep them, and makes them again where not.

#include "linear/matmul.h"

#include <omp.h>

namespace {

struct Sizes {
    int64_t batch, length, queries, heads, nope, rope, value, block;
    int64_t shared;  // whether all sequences stand at the same positions
    float scale;

    int64_t older() const { return length - queries; }  // keys before the first query

    int64_t width() const { return nope + rope; }

    int64_t keyvalue() const { return nope + value; }
};

// What lies in memory for all heads: queries (B,S,H,P+R) with their last R numbers to be rotated, keys and values
// (B,T,H,P+V) side by side, the rotated key (B,T,R) that all heads share; the queries' cos and sin, (S,J) or (B,S,J).
template <class T>
struct Inputs {
    const T *query, *keyvalue, *key;
    const float *cos, *sin;
};

// One head's queries (S,X) and keys (T,X). Interleaved pairs become two halves as they turn.
template <class T>
inline void read_head(const Inputs<T>& from, const Sizes& size, int64_t b, int64_t h, T* q, T* k) {
    const int64_t pairs = size.rope / 2, width = size.width();
    for (int64_t t = 0; t < size.length; t++) {
        const int64_t row = b * size.length + t;
        std::memcpy(k + t * width, from.keyvalue + (row * size.heads + h) * size.keyvalue(), size.nope * sizeof(T));
        std::memcpy(k + t * width + size.nope, from.key + row * size.rope, size.rope * sizeof(T));
    }
    for (int64_t s = 0; s < size.queries; s++) {
        const int64_t row = b * size.queries + s, turn = (size.shared ? s : row) * pairs;
        const T* query = from.query + (row * size.heads + h) * width;
        std::memcpy(q + s * width, query, size.nope * sizeof(T));
        each(pairs, [&](int64_t j, int64_t n) {
            Floats x, y;
            load_pairs(query + size.nope + 2 * j, n, x, y);
            Floats cosine = load(from.cos + turn + j, n), sine = load(from.sin + turn + j, n);
            T* to = q + s * width + size.nope + j;
            store(to, x * cosine - y * sine, n);
            store(to + pairs, y * cosine + x * sine, n);
        });
    }
}

// The reverse: one head's gradients to where they belong. The shared key's are left per head, (B,H,S,R) in float32.
template <class T>
inline void write_head(const Inputs<T>& from, const Sizes& size, int64_t b, int64_t h, const T* dq, const float* dk,
                       const float* dv, T* dquery, T* dkeyvalue, float* dkeys) {
    const int64_t pairs = size.rope / 2, width = size.width();
    for (int64_t s = 0; s < size.length; s++) {
        const int64_t row = b * size.length + s, turn = (size.shared ? s : row) * pairs;
        T* query = dquery + (row * size.heads + h) * width;
        T* keyvalue = dkeyvalue + (row * size.heads + h) * size.keyvalue();
        std::memcpy(query, dq + s * width, size.nope * sizeof(T));
        convert(dk + s * width, keyvalue, size.nope);
        convert(dv + s * size.value, keyvalue + size.nope, size.value);
        float* key = dkeys + ((b * size.heads + h) * size.length + s) * size.rope;
        std::memcpy(key, dk + s * width + size.nope, size.rope * sizeof(float));
        each(pairs, [&](int64_t j, int64_t n) {
            const T* at = dq + s * width + size.nope + j;
            Floats x = load(at, n), y = load(at + pairs, n);
            Floats cosine = load(from.cos + turn + j, n), sine = load(from.sin + turn + j, n);
            store_pairs(query + size.nope + 2 * j, x * cosine + y * sine, y * cosine - x * sine, n);
        });
    }
}

// probs = softmax(scale·scores) over the first `seen` keys, zero after; the scores are used up.
template <class T>
inline void softmax_row(float* scores, T* probs, int64_t seen, int64_t keys, float scale) {
    Floats best = fill(-INFINITY), total = {};
    each(seen, [&](int64_t i, int64_t n) {
        Floats value = keep(load(scores + i, n), n, -INFINITY);
        best = value > best ? value : best;
    });
    const float top = largest(best);
    each(seen, [&](int64_t i, int64_t n) {
        Floats power = keep(exponential((load(scores + i, n) - top) * scale), n, 0.0f);
        store(scores + i, power, n);
        total += power;
    });
    const float inverse = 1.0f / sum(total);
    each(seen, [&](int64_t i, int64_t n) { store(probs + i, load(scores + i, n) * inverse, n); });
    std::memset(probs + seen, 0, (keys - seen) * sizeof(T));
}

// Gradients of one row of scores, scale·p·(dp − Σ p·dp), from those of its probabilities; zero after the keys seen.
template <class T>
inline void softmax_row_backward(const T* p, const float* dp, T* dscores, int64_t seen, int64_t keys, float scale) {
    Floats products = {};
    each(seen, [&](int64_t i, int64_t n) { products += load(p + i, n) * load(dp + i, n); });
    const float total = sum(products);
    each(seen, [&](int64_t i, int64_t n) {
        store(dscores + i, load(p + i, n) * (load(dp + i, n) - total) * scale, n);
    });
    std::memset(dscores + seen, 0, (keys - seen) * sizeof(T));
}

// Attention of the queries start … end to the keys that are not after the last of them.
template <class T>
inline void probabilities(T* probs, const T* q, const Right<T>& k, int64_t start, int64_t end, const Sizes& size) {
    const int64_t rows = end - start, keys = size.older() + end, width = size.width();
    float* scores = scratch<float>(3, rows * keys);
    multiply(scores, keys, keys, matrix(q + start * width, rows, width), k);
    for (int64_t row = 0; row < rows; row++)
        softmax_row(scores + row * keys, probs + row * keys, size.older() + start + row + 1, keys, size.scale);
}

// Numbers of a head's blocks of probabilities that come before query `start`.
inline int64_t kept_before(int64_t start, int64_t block) {
    const int64_t blocks = start / block;
    return block * block * (blocks * (blocks + 1) / 2);
}

template <class T>
void attention(int threads, const T* query, const T* keyvalue, const T* key, const float* cos, const float* sin, T* out,
               T* kept, int64_t batch, int64_t length, int64_t queries, int64_t heads, int64_t nope, int64_t rope,
               int64_t value, int64_t block, int64_t shared, double scale) {
    const Sizes size{batch, length, queries, heads, nope, rope, value, block, shared, float(scale)};
    const Inputs<T> inputs{query, keyvalue, key, cos, sin};
    const int64_t width = size.width(), last = (length - 1) / block * block;
    const int64_t total = kept_before(last, block) + (length - last) * length;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * heads; task++) {
        const int64_t b = task / heads, h = task % heads;
        T *q = scratch<T>(0, queries * width), *k = scratch<T>(1, length * width);
        T* space = scratch<T>(2, kept ? 0 : block * length);
        read_head(inputs, size, b, h, q, k);
        const T* v = keyvalue + (b * length * heads + h) * size.keyvalue() + nope;
        const Right<T> k_turned(transposed(k, length, width), 10);
        const Right<T> values(matrix(v, length, value, heads * size.keyvalue()), 11);
        for (int64_t start = 0; start < queries; start += block) {
            const int64_t end = start + block < queries ? start + block : queries, keys = size.older() + end;
            T* probs = kept ? kept + task * total + kept_before(start, block) : space;
            probabilities(probs, q, k_turned, start, end, size);
            T* to = out + ((b * queries + start) * heads + h) * value;
            multiply(to, heads * value, value, matrix(probs, end - start, keys), values);
        }
    }
}

// Every key has its query here, S = T. dkeys has room for (B,H,S,R).
template <class T>
void attention_backward(int threads, const T* query, const T* keyvalue, const T* key, const float* cos,
                        const float* sin, const T* kept, const T* dout, T* dquery, T* dkeyvalue, T* dkey, float* dkeys,
                        int64_t batch, int64_t length, int64_t heads, int64_t nope, int64_t rope, int64_t value,
                        int64_t block, int64_t shared, double scale) {
    const Sizes size{batch, length, length, heads, nope, rope, value, block, shared, float(scale)};
    const Inputs<T> inputs{query, keyvalue, key, cos, sin};
    const int64_t width = size.width(), last = (length - 1) / block * block;
    const int64_t total = kept_before(last, block) + (length - last) * length;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < batch * heads; task++) {
        const int64_t b = task / heads, h = task % heads;
        T *q = scratch<T>(0, length * width), *k = scratch<T>(1, length * width), *dq = scratch<T>(4, length * width);
        T *space = scratch<T>(2, kept ? 0 : block * length), *dscores = scratch<T>(5, block * length);
        float *dprobs = scratch<float>(6, block * length);
        float *dk = scratch<float>(7, length * width), *dv = scratch<float>(8, length * value);
        read_head(inputs, size, b, h, q, k);
        const T* v = keyvalue + (b * length * heads + h) * size.keyvalue() + nope;
        const Right<T> values_turned(transposed(v, length, value, heads * size.keyvalue()), 10);
        const Right<T> keys(matrix(k, length, width), 11);
        const Right<T> keys_turned(transposed(k, kept ? 0 : length, width), 12);
        // The last block sees all keys, so it sets what the others add to.
        for (int64_t start = last; start >= 0; start -= block) {
            const int64_t end = start + block < length ? start + block : length, rows = end - start;
            const Into into = start == last ? Into::place : Into::sum;
            const T* probs = kept ? kept + task * total + kept_before(start, block) : space;
            if (!kept) probabilities(space, q, keys_turned, start, end, size);
            const auto dout_block = matrix(dout + ((b * length + start) * heads + h) * value, rows, value, heads * value);
            multiply(dv, value, value, transposed(probs, rows, end), Right<T>(dout_block), into);
            multiply(dprobs, end, end, dout_block, values_turned);
            for (int64_t row = 0; row < rows; row++)
                softmax_row_backward(probs + row * end, dprobs + row * end, dscores + row * end, start + row + 1, end,
                                     size.scale);
            multiply(dq + start * width, width, width, matrix(dscores, rows, end), keys);
            multiply(dk, width, width, transposed(dscores, rows, end), Right<T>(matrix(q + start * width, rows, width)),
                     into);
        }
        write_head(inputs, size, b, h, dq, dk, dv, dquery, dkeyvalue, dkeys);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < batch * length; row++) {
        const int64_t b = row / length, s = row % length;
        each(rope, [&](int64_t j, int64_t n) {
            Floats total = {};
            for (int64_t h = 0; h < heads; h++) total += load(dkeys + ((b * heads + h) * length + s) * rope + j, n);
            store(dkey + row * rope + j, total, n);
        });
    }
}

}  // namespace

EXPORT(attention)
EXPORT(attention_backward)
