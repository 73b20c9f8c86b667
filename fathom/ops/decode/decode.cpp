// One decode step: a forward pass over a few tokens of any number of sequences, with the latents in a paged cache.
//
// In plain torch a step is some hundred small operators a layer, each of which waits for the one before. Here one call
// runs the whole model, and threads synchronise only at the barriers between its phases. Attention takes the absorbed
// form. Sums are float32 whatever the weights are; results are
// batch-invariant: a token's values do not depend on the other tokens of the step. What is computed is defined by
// Model.forward_with_cache and Model.forward_mtp_with_cache in fathom/model/transformer.py.
//
// Letters as everywhere: N tokens, D hidden, H heads, P nope, R rope, V value, C latent, W = C+R.

#include "attention/latents.h"
#include "decode/buffers.h"
#include "decode/feed_forward.h"
#include "decode/plan.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kLeastPart = 128;  // cached tokens that one thread attends at a time, while a token has few parts
constexpr int64_t kMostParts = 32;   // of one token: each leaves a row per head to be combined in the end

void normalise(const float* x, const Weight& weight, double eps, float* y, int64_t size) {
    Floats squares = {};
    each(size, [&](int64_t i, int64_t n) {
        Floats value = load(x + i, n);
        squares += value * value;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / float(size) + float(eps));
    const float* by = static_cast<const float*>(weight.data);
    each(size, [&](int64_t i, int64_t n) { store(y + i, load(x + i, n) * scale * load(by + i, n), n); });
}

// Interleaved pairs become two halves as they are rotated, as in apply_rope.
void rotate(const float* x, const float* cosines, const float* sines, float* y, int64_t pairs) {
    for (int64_t j = 0; j < pairs; j++) {
        const float first = x[2 * j], second = x[2 * j + 1];
        y[j] = first * cosines[j] - second * sines[j];
        y[pairs + j] = first * sines[j] + second * cosines[j];
    }
}

// One row of a matrix, as float32.
void read_row(const Weight& weight, int64_t row, float* to) {
    if (weight.format == kFloat32)
        convert(static_cast<const float*>(weight.data) + row * weight.columns, to, weight.columns);
    else
        convert(static_cast<const bf16*>(weight.data) + row * weight.columns, to, weight.columns);
}

// Every function below is called by all threads of one parallel region and shares its work among them.
template <class T>
class Pass {
  public:
    Pass(const Plan& plan, const Step& step, Buffers& b)
        : plan_(plan), step_(step), b_(b), feed_forward_(plan, step, b), width_(plan.latent + plan.rope),
          tokens_(step.tokens), from_(tokens_), to_(tokens_) {}

    void main_model() {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) read_row(plan_.embed, step_.token_ids[n], b_.x[n]);
        int64_t sparse = 0;
        for (int64_t l = 0; l < plan_.layer_count; l++) {
            layer(plan_.layers[l], l, sparse);
            sparse += plan_.layers[l].router.data != nullptr;
        }
        finish(plan_.norm);
    }

    void module(int64_t index) {
        const Module& module = plan_.modules[index];
        const int64_t size = plan_.hidden;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) {
            float* joined = b_.gates[n];
            read_row(plan_.embed, step_.token_ids[n], joined);
            normalise(joined, module.embed_norm, plan_.eps, joined, size);
            normalise(step_.prev_hidden + n * size, module.state_norm, plan_.eps, joined + size, size);
        }
        linear(module.join, b_.gates.all(), b_.x.all(), tokens_);
        // No pair of a state and the token after it ends in the first token: slot 0 of a module is never written.
        begin_ = 1;
        if (!step_.hidden) return write_kv_cache(module.layer, cache_of(plan_.layer_count + index));
        layer(module.layer, plan_.layer_count + index, -1);
        finish(module.norm);
    }

  private:
    T* cache_of(int64_t index) { return static_cast<T*>(step_.cache) + index * plan_.slots * width_; }

    void layer(const Layer& layer, int64_t index, int64_t sparse) {
        T* cache = cache_of(index);
        project(layer, cache);
        absorb(layer);
        attend(cache);
        merge(layer);
        linear(layer.o, b_.heads.all(), b_.x.all(), tokens_, true);
        normalise_all(b_.x, layer.post_norm);
        feed_forward_.run(layer, sparse);
    }

    void finish(const Weight& norm) {
        const int64_t size = plan_.hidden;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) {
            normalise(b_.x[n], norm, plan_.eps, b_.normed[n], size);
            convert(b_.normed[n], step_.hidden + n * size, size);
        }
#pragma omp single
        {
            b_.inputs.resize(step_.logits_count);
            b_.outputs.resize(step_.logits_count);
            for (int64_t i = 0; i < step_.logits_count; i++) {
                b_.inputs[i] = b_.normed[step_.logits_indices[i]];
                b_.outputs[i] = step_.logits + i * plan_.head.rows;
            }
        }
        linear(plan_.head, b_.inputs.data(), b_.outputs.data(), step_.logits_count);
    }

    void linear(const Weight& weight, float* const* xs, float* const* ys, int64_t vectors, bool add = false) {
        const GemvInputs all(weight, xs, vectors);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < weight.rows; row += kRowBlock)
            all.gemv(weight, row, std::min(row + kRowBlock, weight.rows), ys, add);
    }

    void normalise_all(Rows& from, const Weight& norm) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) normalise(from[n], norm, plan_.eps, b_.normed[n], plan_.hidden);
    }

    // Queries of all heads; the latents, into the cache.
    void project(const Layer& layer, T* cache) {
        normalise_all(b_.x, layer.input_norm);
        const bool ranked = layer.q_a.data;
        const Weight& first = ranked ? layer.q_a : layer.q_b;
        Rows& out = ranked ? b_.q_a : b_.q;
        const int64_t blocks = (first.rows + kRowBlock - 1) / kRowBlock;
        const int64_t last = blocks + (layer.kv_a.rows + kRowBlock - 1) / kRowBlock;
        const GemvInputs all(first.format == kBfloat16 ? first : layer.kv_a, b_.normed.all(), tokens_);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < last; i++) {
            const Weight& weight = i < blocks ? first : layer.kv_a;
            const int64_t row = (i < blocks ? i : i - blocks) * kRowBlock;
            Rows& to = i < blocks ? out : b_.kv;
            all.gemv(weight, row, std::min(row + kRowBlock, weight.rows), to.all());
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) {
            write_latent(layer, cache, n);
            if (ranked) normalise(b_.q_a[n], layer.q_a_norm, plan_.latent_eps, b_.q_a[n], layer.q_a.rows);
        }
        if (ranked) linear(layer.q_b, b_.q_a.all(), b_.q.all(), tokens_);
    }

    void write_latent(const Layer& layer, T* cache, int64_t n) {
        float* kv = b_.kv[n];
        normalise(kv, layer.kv_a_norm, plan_.latent_eps, kv, plan_.latent);
        float* rotated = b_.queries[n * plan_.heads];  // not in use yet
        rotate_at(kv + plan_.latent, n, rotated);
        T* slot = cache + step_.slot_mapping[n] * width_;
        convert(kv, slot, plan_.latent);
        convert(rotated, slot + plan_.latent, plan_.rope);
    }

    // The latents alone.
    void write_kv_cache(const Layer& layer, T* cache) {
        normalise_all(b_.x, layer.input_norm);
        linear(layer.kv_a, b_.normed.all(), b_.kv.all(), tokens_);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < tokens_; n++) write_latent(layer, cache, n);
    }

    void rotate_at(const float* x, int64_t token, float* y) {
        const int64_t pairs = plan_.rope / 2, at = (step_.positions[token] - begin_) * pairs;
        rotate(x, plan_.cosines + at, plan_.sines + at, y, pairs);
    }

    // Each head's query in terms of the latents, scaled: row n·H + h of `queries`.
    void absorb(const Layer& layer) {
        const int64_t heads = plan_.heads, query = plan_.nope + plan_.rope;
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < heads; h++) {
            const Weight keys = layer.kv_b.part(0, h * (plan_.nope + plan_.value), plan_.nope);
            for (int64_t n = 0; n < tokens_; n++) {
                from_[n] = b_.q[n] + h * query;
                to_[n] = b_.queries[n * heads + h];
                std::fill(to_[n], to_[n] + plan_.latent, 0.0f);
            }
            mix(keys, from_.data(), to_.data(), tokens_);
            for (int64_t n = 0; n < tokens_; n++) {
                rotate_at(from_[n] + plan_.nope, n, to_[n] + plan_.latent);
                for (int64_t i = 0; i < width_; i++) to_[n][i] *= float(plan_.scale);
            }
        }
    }

    void mix(const Weight& rows, const float* const* weights, float* const* outs, int64_t count) {
        if (rows.format == kFloat32)
            add_weighted_rows(static_cast<const float*>(rows.data), rows.columns, rows.rows, rows.columns, weights, outs,
                              count);
        else
            add_weighted_rows(static_cast<const bf16*>(rows.data), rows.columns, rows.rows, rows.columns, weights, outs,
                              count);
    }

    // Every part attends a range of one token's past, all heads at once.
    void attend(const T* cache) {
#pragma omp single
        plan_parts();
        const int64_t heads = plan_.heads, parts = b_.part_token.size();
        LatentAttention<T> all(heads, plan_.latent, width_);
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < parts; part++) {
            const int64_t token = b_.part_token[part];
            const int64_t end = std::min(b_.part_first[part] + part_size(token), step_.positions[token] + 1);
            const int64_t* pages = step_.block_tables + step_.seq_indices[token] * step_.max_blocks_per_seq;
            all.set_queries(b_.queries.all() + token * heads);
            all.begin(b_.parts.all() + part * heads, &b_.highest[part * heads], &b_.total[part * heads]);
            each_run(pages, std::max(b_.part_first[part], begin_), end,
                     [&](int64_t slot, int64_t count) { all.attend(cache + slot * width_, count); });
            all.end();
        }
    }

    // From the token's position alone: sums do not depend on the batch or the number of threads.
    int64_t part_size(int64_t token) const {
        return kLeastPart * (step_.positions[token] / (kLeastPart * kMostParts) + 1);
    }

    void plan_parts() {
        b_.part_token.clear();
        b_.part_first.clear();
        b_.parts_before.assign(1, 0);
        for (int64_t n = 0; n < tokens_; n++) {
            for (int64_t first = 0; first <= step_.positions[n]; first += part_size(n)) {
                b_.part_token.push_back(n);
                b_.part_first.push_back(first);
            }
            b_.parts_before.push_back(b_.part_token.size());
        }
        const int64_t rows = b_.part_token.size() * plan_.heads;
        b_.parts.shape(rows, plan_.latent);
        b_.highest.resize(rows);
        b_.total.resize(rows);
    }

    // body(slot, count) for each run of positions that lies in one page.
    template <class Body>
    void each_run(const int64_t* pages, int64_t from, int64_t end, Body body) {
        for (int64_t at = from; at < end;) {
            const int64_t page = at / plan_.page_size;
            const int64_t next = std::min({end, (page + 1) * plan_.page_size, at + kRun});
            body(pages[page] * plan_.page_size + at % plan_.page_size, next - at);
            at = next;
        }
    }

    // Combines the parts of each token, and projects the latents to every head's values.
    void merge(const Layer& layer) {
        const int64_t heads = plan_.heads;
#pragma omp for schedule(dynamic)
        for (int64_t h = 0; h < heads; h++) {
            const Weight values = layer.kv_b.part(0, h * (plan_.nope + plan_.value) + plan_.nope, plan_.value);
            for (int64_t n = 0; n < tokens_; n++) {
                const int64_t first = b_.parts_before[n], last = b_.parts_before[n + 1];
                float highest = -INFINITY, total = 0;
                for (int64_t p = first; p < last; p++) highest = std::max(highest, b_.highest[p * heads + h]);
                float* out = b_.queries[n * heads + h];  // the query is no longer needed
                std::fill(out, out + plan_.latent, 0.0f);
                for (int64_t p = first; p < last; p++) {
                    const float share = std::exp(b_.highest[p * heads + h] - highest);
                    const float* part = b_.parts[p * heads + h];
                    total += share * b_.total[p * heads + h];
                    each(plan_.latent, [&](int64_t i, int64_t k) {
                        store(out + i, load(out + i, k) + load(part + i, k) * share, k);
                    });
                }
                for (int64_t i = 0; i < plan_.latent; i++) out[i] /= total;
                from_[n] = out;
                to_[n] = b_.heads[n] + h * plan_.value;
            }
            GemvInputs(values, from_.data(), tokens_).gemv(values, 0, plan_.value, to_.data());
        }
    }

    const Plan& plan_;
    const Step& step_;
    Buffers& b_;
    FeedForward feed_forward_;
    const int64_t width_, tokens_;
    std::vector<float*> from_, to_;  // one head's rows of every token; each thread has its own
    int64_t begin_ = 0;  // the first slot that is attended; positions count from it
};

// The main model, or MTP module `module` where that is not negative.
template <class T>
void decode(int threads, const Plan* plan, const Step* step, int64_t module) {
    static thread_local Buffers buffers;
    Buffers& shared = buffers;
    make_room(shared, *plan, step->tokens);
#pragma omp parallel num_threads(threads)
    {
        Pass<T> pass(*plan, *step, shared);
        if (module < 0)
            pass.main_model();
        else
            pass.module(module);
    }
}

}  // namespace

EXPORT(decode)
