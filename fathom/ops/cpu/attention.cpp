// Latent attention in its expanded form, forward and backward: a thread takes one head of one sequence at a time.
//
// Defined by expanded_attention_reference in fathom/ops/attention.py. Queries go through in blocks that skip the keys
// after them; a block's scores stay in the thread's cache from product to softmax to product. The backward pass reads
// the probabilities again where the caller gave room to keep them, and makes them again where not.

#include "products.h"

#include <omp.h>

namespace {

struct Sizes {
    int64_t batch, length, queries, heads, nope, rope, value, block;
    int64_t shared;  // whether all sequences stand at the same positions
    float scale;

    int64_t older() const { return length - queries; }  // keys before the first query

    int64_t width() const { return nope + rope; }
};

// What lies in memory for all heads: queries (B,S,H,P+R) with their last R numbers to be rotated, keys and values
// (B,T,H,P+V) side by side, the rotated key (B,T,R) that all heads share; the queries' cos and sin, (S,J) or (B,S,J).
template <class T>
struct Inputs {
    const T *query, *keyvalue, *key;
    const float *cos, *sin;
};

// One head's matrices (S,X), (T,X) and (T,V). Interleaved pairs become two halves as they turn.
template <class T>
inline void read_head(const Inputs<T>& from, const Sizes& size, int64_t b, int64_t h, T* q, T* k, T* v) {
    const int64_t pairs = size.rope / 2, width = size.width();
    for (int64_t t = 0; t < size.length; t++) {
        const int64_t row = b * size.length + t;
        const T* keyvalue = from.keyvalue + (row * size.heads + h) * (size.nope + size.value);
        std::memcpy(k + t * width, keyvalue, size.nope * sizeof(T));
        std::memcpy(k + t * width + size.nope, from.key + row * size.rope, size.rope * sizeof(T));
        std::memcpy(v + t * size.value, keyvalue + size.nope, size.value * sizeof(T));
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
        T* keyvalue = dkeyvalue + (row * size.heads + h) * (size.nope + size.value);
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

// body(offset, count, read) over the first `seen` of `keys` numbers, a vector at a time. Where the row goes on, whole
// vectors may be read (`read` is kLanes) of which only `count` numbers are meant.
template <class Body>
inline void each_seen(int64_t seen, int64_t keys, Body body) {
    for (int64_t i = 0; i < seen; i += kLanes) {
        const int64_t count = seen - i < kLanes ? seen - i : kLanes;
        body(i, count, i + kLanes <= keys ? kLanes : keys - i);
    }
}

// One row of scores becomes softmax(scale·scores) over the first `seen` keys, zero after; `powers` has room for a row.
template <class T>
inline void softmax_row(T* row, int64_t seen, int64_t keys, float scale, float* powers) {
    Floats best = fill(-INFINITY), total = {};
    each_seen(seen, keys, [&](int64_t i, int64_t n, int64_t read) {
        Floats value = keep(load(row + i, read), n, -INFINITY);
        best = value > best ? value : best;
    });
    const float top = largest(best);
    each_seen(seen, keys, [&](int64_t i, int64_t n, int64_t read) {
        Floats power = keep(exponential((load(row + i, read) - top) * scale), n, 0.0f);
        store(powers + i, power);
        total += power;
    });
    const float inverse = 1.0f / sum(total);
    each_seen(seen, keys, [&](int64_t i, int64_t, int64_t read) { store(row + i, load(powers + i) * inverse, read); });
    const int64_t written = (seen + kLanes - 1) / kLanes * kLanes;
    if (written < keys) std::memset(row + written, 0, (keys - written) * sizeof(T));
}

// One row of the probabilities' gradients becomes scale·p·(dp − Σ p·dp); p is zero after the keys seen.
template <class T>
inline void softmax_row_backward(const T* p, T* dp, int64_t seen, int64_t keys, float scale) {
    Floats products = {};
    each_seen(seen, keys, [&](int64_t i, int64_t, int64_t read) { products += load(p + i, read) * load(dp + i, read); });
    const float total = sum(products);
    each_seen(seen, keys, [&](int64_t i, int64_t, int64_t read) {
        store(dp + i, load(p + i, read) * (load(dp + i, read) - total) * scale, read);
    });
    const int64_t written = (seen + kLanes - 1) / kLanes * kLanes;
    if (written < keys) std::memset(dp + written, 0, (keys - written) * sizeof(T));
}

// Attention of the queries start … end to the keys that are not after the last of them.
template <class T>
inline void probabilities(T* probs, const T* q, const T* k, int64_t start, int64_t end, const Sizes& size) {
    const int64_t rows = end - start, keys = size.older() + end, width = size.width();
    multiply<T>({probs, rows, keys}, {q + start * width, rows, width}, Transposed<T>(k, keys, width));
    float* powers = scratch<float>(15, keys + kLanes);
    for (int64_t row = 0; row < rows; row++)
        softmax_row(probs + row * keys, size.older() + start + row + 1, keys, size.scale, powers);
}

// to += from, or to = from where nothing has been added yet.
template <class T>
inline void accumulate(float* to, const T* from, int64_t size, bool first) {
    each(size, [&](int64_t i, int64_t n) {
        Floats value = load(from + i, n);
        store(to + i, first ? value : value + load(to + i, n), n);
    });
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
        T *q = scratch<T>(0, queries * width), *k = scratch<T>(1, length * width), *v = scratch<T>(2, length * value);
        T *result = scratch<T>(4, block * value), *space = scratch<T>(3, kept ? 0 : block * length);
        read_head(inputs, size, b, h, q, k, v);
        for (int64_t start = 0; start < queries; start += block) {
            const int64_t end = start + block < queries ? start + block : queries, rows = end - start;
            const int64_t keys = size.older() + end;
            T* probs = kept ? kept + task * total + kept_before(start, block) : space;
            probabilities(probs, q, k, start, end, size);
            multiply<T>({result, rows, value}, {probs, rows, keys}, {v, keys, value});
            for (int64_t row = 0; row < rows; row++) {
                T* to = out + ((b * queries + start + row) * heads + h) * value;
                std::memcpy(to, result + row * value, value * sizeof(T));
            }
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
        T *q = scratch<T>(0, length * width), *k = scratch<T>(1, length * width), *v = scratch<T>(2, length * value);
        T *space = scratch<T>(3, kept ? 0 : block * length), *dprobs = scratch<T>(4, block * length);
        T *dq = scratch<T>(5, length * width), *dout_head = scratch<T>(6, length * value);
        T* part = scratch<T>(7, length * (width > value ? width : value));
        float *dk = scratch<float>(8, length * width), *dv = scratch<float>(9, length * value);
        read_head(inputs, size, b, h, q, k, v);
        for (int64_t s = 0; s < length; s++) {
            const T* from = dout + ((b * length + s) * heads + h) * value;
            std::memcpy(dout_head + s * value, from, value * sizeof(T));
        }
        // The last block sees all keys, so it sets what the others add to.
        for (int64_t start = last; start >= 0; start -= block) {
            const int64_t end = start + block < length ? start + block : length, rows = end - start;
            const T *q_block = q + start * width, *dout_block = dout_head + start * value;
            const T* probs = kept ? kept + task * total + kept_before(start, block) : space;
            if (!kept) probabilities(space, q, k, start, end, size);
            multiply<T>({part, end, value}, Transposed<T>(probs, rows, end), {dout_block, rows, value});
            accumulate(dv, part, end * value, start == last);
            multiply<T>({dprobs, rows, end}, {dout_block, rows, value}, Transposed<T>(v, end, value));
            for (int64_t row = 0; row < rows; row++)
                softmax_row_backward(probs + row * end, dprobs + row * end, start + row + 1, end, size.scale);
            multiply<T>({dq + start * width, rows, width}, {dprobs, rows, end}, {k, end, width});
            multiply<T>({part, end, width}, Transposed<T>(dprobs, rows, end), {q_block, rows, width});
            accumulate(dk, part, end * width, start == last);
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
