// Latent attention in its expanded form, forward and backward: a thread takes one head of one segment at a time.
//
// Defined by expanded_attention_reference in fathom/ops/attention. A segment is a sequence, or a part of one that sees
// nothing of the others. Queries go through in blocks that skip the keys after them; a block's scores stay in the
// thread's cache from matmul to softmax to matmul. The backward pass reads the probabilities again where the caller
// gave room to keep them, and recomputes them where not.

#include "linear/matmul.h"

#include <vector>

#include <omp.h>

namespace {

struct Sizes {
    int64_t heads, nope, rope, value, block;
    int64_t angles;  // rows of cos and sin: those of one sequence, which all share, or of all queries
    float scale;

    int64_t width() const { return nope + rope; }

    int64_t keyvalue() const { return nope + value; }
};

// Some queries and keys that see no others; the last query stands at the last key.
struct Segment {
    int64_t first_query, queries, first_key, keys;

    int64_t older() const { return keys - queries; }  // keys before the first query
};

// `count` segments of equal sizes or, where there are cu_seqlens (1+G), of any, with as many queries as keys.
struct Segments {
    const int32_t* cu_seqlens;
    int64_t count, queries, keys;

    Segment operator[](int64_t g) const {
        if (!cu_seqlens) return {g * queries, queries, g * keys, keys};
        const int64_t first = cu_seqlens[g], length = cu_seqlens[g + 1] - first;
        return {first, length, first, length};
    }

    int64_t tokens() const { return cu_seqlens ? cu_seqlens[count] : count * queries; }
};

// What lies in memory for all heads: queries (B,S,H,P+R) with their last R elements to be rotated, keys and values
// (B,T,H,P+V) side by side, the rotated key (B,T,R) that all heads share; the queries' cos and sin, (S,J) or (B,S,J).
template <class T>
struct Inputs {
    const T *query, *keyvalue, *key;
    const float *cos, *sin;
};

// One head's queries (S,X) and keys (T,X). Interleaved pairs become two halves as they are rotated.
template <class T>
inline void read_head(const Inputs<T>& from, const Sizes& size, const Segment& segment, int64_t h, T* q, T* k) {
    const int64_t pairs = size.rope / 2, width = size.width();
    for (int64_t t = 0; t < segment.keys; t++) {
        const int64_t row = segment.first_key + t;
        std::memcpy(k + t * width, from.keyvalue + (row * size.heads + h) * size.keyvalue(), size.nope * sizeof(T));
        std::memcpy(k + t * width + size.nope, from.key + row * size.rope, size.rope * sizeof(T));
    }
    for (int64_t s = 0; s < segment.queries; s++) {
        const int64_t row = segment.first_query + s, angle = row % size.angles * pairs;
        const T* query = from.query + (row * size.heads + h) * width;
        std::memcpy(q + s * width, query, size.nope * sizeof(T));
        each(pairs, [&](int64_t j, int64_t n) {
            Floats x, y;
            load_pairs(query + size.nope + 2 * j, n, x, y);
            Floats cosine = load(from.cos + angle + j, n), sine = load(from.sin + angle + j, n);
            T* to = q + s * width + size.nope + j;
            store(to, x * cosine - y * sine, n);
            store(to + pairs, y * cosine + x * sine, n);
        });
    }
}

// The reverse: one head's gradients to where they belong. The shared key's are left per head, (H,N,R) in float32.
template <class T>
inline void write_head(const Inputs<T>& from, const Sizes& size, const Segment& segment, int64_t tokens, int64_t h,
                       const T* dq, const float* dk, const float* dv, T* dquery, T* dkeyvalue, float* dkeys) {
    const int64_t pairs = size.rope / 2, width = size.width();
    for (int64_t s = 0; s < segment.queries; s++) {
        const int64_t row = segment.first_query + s, angle = row % size.angles * pairs;
        T* query = dquery + (row * size.heads + h) * width;
        T* keyvalue = dkeyvalue + (row * size.heads + h) * size.keyvalue();
        std::memcpy(query, dq + s * width, size.nope * sizeof(T));
        convert(dk + s * width, keyvalue, size.nope);
        convert(dv + s * size.value, keyvalue + size.nope, size.value);
        std::memcpy(dkeys + (h * tokens + row) * size.rope, dk + s * width + size.nope, size.rope * sizeof(float));
        each(pairs, [&](int64_t j, int64_t n) {
            const T* at = dq + s * width + size.nope + j;
            Floats x = load(at, n), y = load(at + pairs, n);
            Floats cosine = load(from.cos + angle + j, n), sine = load(from.sin + angle + j, n);
            store_pairs(query + size.nope + 2 * j, x * cosine + y * sine, y * cosine - x * sine, n);
        });
    }
}

// probs = softmax(scale·scores) over the first `seen` keys, zero after; the scores are used up.
template <class T>
inline void softmax_row(float* scores, T* probs, int64_t seen, int64_t keys, float scale) {
    Floats best = fill(-INFINITY), total = {};
    each(seen, [&](int64_t i, int64_t n) {
        Floats value = mask_tail(load(scores + i, n), n, -INFINITY);
        best = value > best ? value : best;
    });
    const float top = largest(best);
    each(seen, [&](int64_t i, int64_t n) {
        Floats power = mask_tail(exponential((load(scores + i, n) - top) * scale), n, 0.0f);
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
    Floats weighted = {};
    each(seen, [&](int64_t i, int64_t n) { weighted += load(p + i, n) * load(dp + i, n); });
    const float total = sum(weighted);
    each(seen, [&](int64_t i, int64_t n) {
        store(dscores + i, load(p + i, n) * (load(dp + i, n) - total) * scale, n);
    });
    std::memset(dscores + seen, 0, (keys - seen) * sizeof(T));
}

// Attention of the queries start … end to the keys that are not after the last of them.
template <class T>
inline void probabilities(T* probs, const T* q, const Right<T>& k, int64_t start, int64_t end, int64_t older,
                          const Sizes& size) {
    const int64_t rows = end - start, keys = older + end, width = size.width();
    float* scores = scratch<float>(3, rows * keys);
    multiply(scores, keys, keys, matrix(q + start * width, rows, width), k);
    for (int64_t row = 0; row < rows; row++)
        softmax_row(scores + row * keys, probs + row * keys, older + start + row + 1, keys, size.scale);
}

// Elements of a head's blocks of probabilities that come before query `start`.
inline int64_t kept_before(int64_t start, int64_t block) {
    const int64_t blocks = start / block;
    return block * block * (blocks * (blocks + 1) / 2);
}

// First query of the last block.
inline int64_t last_block(int64_t queries, int64_t block) { return (queries - 1) / block * block; }

// Elements of all of a head's blocks, where it has as many queries as keys.
inline int64_t kept_size(int64_t length, int64_t block) {
    const int64_t last = last_block(length, block);
    return kept_before(last, block) + (length - last) * length;
}

// Where each segment's kept probabilities begin.
inline std::vector<int64_t> kept_offsets(const Segments& segments, const Sizes& size) {
    std::vector<int64_t> offsets(segments.count + 1);
    for (int64_t g = 0; g < segments.count; g++)
        offsets[g + 1] = offsets[g] + size.heads * kept_size(segments[g].keys, size.block);
    return offsets;
}

template <class T>
void attention(int threads, const T* query, const T* keyvalue, const T* key, const float* cos, const float* sin,
               const int32_t* cu_seqlens, T* out, T* kept, int64_t count, int64_t all_keys, int64_t all_queries,
               int64_t heads, int64_t nope, int64_t rope, int64_t value, int64_t block, int64_t angles, double scale) {
    const Segments segments{cu_seqlens, count, all_queries, all_keys};
    const Sizes size{heads, nope, rope, value, block, angles, float(scale)};
    const Inputs<T> inputs{query, keyvalue, key, cos, sin};
    const int64_t width = size.width();
    const std::vector<int64_t> offsets = kept_offsets(segments, size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < count * heads; task++) {
        const int64_t g = task / heads, h = task % heads;
        const Segment segment = segments[g];
        const int64_t queries = segment.queries, length = segment.keys, older = segment.older();
        if (!queries) continue;
        T *q = scratch<T>(0, queries * width), *k = scratch<T>(1, length * width);
        T* space = scratch<T>(2, kept ? 0 : block * length);
        T* own_kept = kept ? kept + offsets[g] + h * kept_size(length, block) : nullptr;
        read_head(inputs, size, segment, h, q, k);
        const T* v = keyvalue + (segment.first_key * heads + h) * size.keyvalue() + nope;
        const Right<T> k_transposed(transposed(k, length, width), 10);
        const Right<T> values(matrix(v, length, value, heads * size.keyvalue()), 11);
        for (int64_t start = 0; start < queries; start += block) {
            const int64_t end = start + block < queries ? start + block : queries, keys = older + end;
            T* probs = kept ? own_kept + kept_before(start, block) : space;
            probabilities(probs, q, k_transposed, start, end, older, size);
            T* to = out + ((segment.first_query + start) * heads + h) * value;
            multiply(to, heads * value, value, matrix(probs, end - start, keys), values);
        }
    }
}

// Every key has its query here, S = T. dkeys has room for (H,N,R), N tokens.
template <class T>
void attention_backward(int threads, const T* query, const T* keyvalue, const T* key, const float* cos,
                        const float* sin, const int32_t* cu_seqlens, const T* kept, const T* dout, T* dquery,
                        T* dkeyvalue, T* dkey, float* dkeys, int64_t count, int64_t all_keys, int64_t heads,
                        int64_t nope, int64_t rope, int64_t value, int64_t block, int64_t angles, double scale) {
    const Segments segments{cu_seqlens, count, all_keys, all_keys};
    const Sizes size{heads, nope, rope, value, block, angles, float(scale)};
    const Inputs<T> inputs{query, keyvalue, key, cos, sin};
    const int64_t width = size.width(), tokens = segments.tokens();
    const std::vector<int64_t> offsets = kept_offsets(segments, size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < count * heads; task++) {
        const int64_t g = task / heads, h = task % heads;
        const Segment segment = segments[g];
        const int64_t length = segment.keys, last = last_block(length, block);
        if (!length) continue;
        T *q = scratch<T>(0, length * width), *k = scratch<T>(1, length * width), *dq = scratch<T>(4, length * width);
        T *space = scratch<T>(2, kept ? 0 : block * length), *dscores = scratch<T>(5, block * length);
        float *dprobs = scratch<float>(6, block * length);
        float *dk = scratch<float>(7, length * width), *dv = scratch<float>(8, length * value);
        const T* own_kept = kept ? kept + offsets[g] + h * kept_size(length, block) : nullptr;
        read_head(inputs, size, segment, h, q, k);
        const T* v = keyvalue + (segment.first_key * heads + h) * size.keyvalue() + nope;
        const Right<T> values_transposed(transposed(v, length, value, heads * size.keyvalue()), 10);
        const Right<T> keys(matrix(k, length, width), 11);
        const Right<T> keys_transposed(transposed(k, kept ? 0 : length, width), 12);
        // The last block sees all keys, so it sets what the others add to.
        for (int64_t start = last; start >= 0; start -= block) {
            const int64_t end = start + block < length ? start + block : length, rows = end - start;
            const Into into = start == last ? Into::place : Into::sum;
            const T* probs = kept ? own_kept + kept_before(start, block) : space;
            if (!kept) probabilities(space, q, keys_transposed, start, end, 0, size);
            const T* dout_start = dout + ((segment.first_query + start) * heads + h) * value;
            const auto dout_block = matrix(dout_start, rows, value, heads * value);
            multiply(dv, value, value, transposed(probs, rows, end), Right<T>(dout_block), into);
            multiply(dprobs, end, end, dout_block, values_transposed);
            for (int64_t row = 0; row < rows; row++)
                softmax_row_backward(probs + row * end, dprobs + row * end, dscores + row * end, start + row + 1, end,
                                     size.scale);
            multiply(dq + start * width, width, width, matrix(dscores, rows, end), keys);
            multiply(dk, width, width, transposed(dscores, rows, end), Right<T>(matrix(q + start * width, rows, width)),
                     into);
        }
        write_head(inputs, size, segment, tokens, h, dq, dk, dv, dquery, dkeyvalue, dkeys);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < tokens; row++)
        each(rope, [&](int64_t j, int64_t n) {
            Floats total = {};
            for (int64_t h = 0; h < heads; h++) total += load(dkeys + (h * tokens + row) * rope + j, n);
            store(dkey + row * rope + j, total, n);
        });
}

}  // namespace

EXPORT(attention)
EXPORT(attention_backward)
