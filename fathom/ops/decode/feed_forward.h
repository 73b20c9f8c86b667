// The second half of a layer in a decode step: routing, and the feed-forwards of the experts or of a dense layer.
//
// Experts that no token chose are not read.
//
// Letters: N tokens, E experts, K choices.

#pragma once

#include "decode/buffers.h"
#include "moe/select.h"

#include <algorithm>

#include <omp.h>

namespace {

// Everything here is called by all threads of one parallel region and shares its work among them.
class FeedForward {
  public:
    FeedForward(const Plan& plan, const Step& step, Buffers& b)
        : plan_(plan), step_(step), b_(b), tokens_(step.tokens) {}

    // Adds a layer's feed-forward of `normed` to `x`. The experts taken are reported as those of MoE layer `sparse`,
    // unless that is negative.
    void run(const Layer& layer, int64_t sparse) {
        if (layer.router.data) route(layer, sparse);
        feed_forward(layer);
    }

  private:
    // The experts of every token, and for each expert its places: (token, top-k rank) pairs n·K + k.
    void route(const Layer& layer, int64_t sparse) {
        // In float32: a rounding here may change which experts are taken.
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < plan_.experts; row += kRowBlock)
            gemv_float32(layer.router, row, std::min(row + kRowBlock, plan_.experts), b_.normed.all(), b_.router.all(),
                         tokens_);
#pragma omp single
        {
            const int64_t choices = plan_.choices;
            const float* bias = static_cast<const float*>(layer.bias.data);
            std::vector<float> biased(plan_.experts);
            ExpertSelector select(plan_.experts, choices, plan_.groups, plan_.topk_group);
            for (int64_t n = 0; n < tokens_; n++) {
                float* scores = b_.router[n];
                each(plan_.experts, [&](int64_t i, int64_t k) { store(scores + i, sigmoid(load(scores + i, k)), k); });
                for (int64_t e = 0; e < plan_.experts; e++) biased[e] = scores[e] + bias[e];
                int64_t* chosen = &b_.chosen[n * choices];
                select(biased.data(), chosen);
                float total = 0;
                for (int64_t k = 0; k < choices; k++) total += scores[chosen[k]];
                const float by = float(plan_.routed_scale) / (plan_.normalise ? total + 1e-20f : 1.0f);
                for (int64_t k = 0; k < choices; k++) b_.weights[n * choices + k] = scores[chosen[k]] * by;
            }
            if (sparse >= 0) {
                const int64_t places = tokens_ * choices;
                std::copy_n(b_.chosen.data(), places, step_.experts + sparse * places);
                std::copy_n(b_.weights.data(), places, step_.weights + sparse * places);
            }
            sort_places();
        }
    }

    void sort_places() {
        const int64_t places = tokens_ * plan_.choices;
        std::fill(b_.first.begin(), b_.first.end(), 0);
        for (int64_t i = 0; i < places; i++) b_.first[b_.chosen[i] + 1]++;
        b_.busy.clear();
        for (int64_t e = 0; e < plan_.experts; e++) {
            if (b_.first[e + 1]) b_.busy.push_back(e);
            b_.first[e + 1] += b_.first[e];
        }
        std::vector<int64_t> next(b_.first.begin(), b_.first.end() - 1);
        b_.inputs.resize(places);
        b_.outputs.resize(places);
        for (int64_t i = 0; i < places; i++) {
            const int64_t at = next[b_.chosen[i]]++;
            b_.order[at] = i;
            b_.inputs[at] = b_.normed[i / plan_.choices];
            b_.outputs[at] = b_.x[i / plan_.choices];
        }
    }

    // The routed experts, and the shared ones as one more expert that all tokens take; or the dense feed-forward alone.
    void feed_forward(const Layer& layer) {
        const bool routed = layer.router.data;
        const int64_t width = layer.gate_up.rows / 2, busy = routed ? b_.busy.size() : 0;
        const int64_t blocks = (width + kRowBlock - 1) / kRowBlock;
        const int64_t common = (layer.gate.rows + kRowBlock - 1) / kRowBlock;
        // Rows of `gates`: one for every place, in the experts' order, then one for every token's common part.
        const int64_t places = routed ? tokens_ * plan_.choices : 0;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < busy * blocks + common; i++) {
            if (i >= busy * blocks) {
                const int64_t row = (i - busy * blocks) * kRowBlock;
                gated(layer.gate, layer.up, row, std::min(row + kRowBlock, layer.gate.rows), b_.normed.all(),
                      b_.gates.all() + places, nullptr, tokens_);
                continue;
            }
            const int64_t e = b_.busy[i / blocks], row = i % blocks * kRowBlock, first = b_.first[e];
            gated(layer.gate_up.part(e, 0, width), layer.gate_up.part(e, width, width), row,
                  std::min(row + kRowBlock, width), b_.inputs.data() + first, b_.gates.all() + first,
                  b_.order.data() + first, b_.first[e + 1] - first);
        }
        // Few large blocks: each rounds every expert's inputs again.
        const int64_t shared = plan_.hidden / (4 * omp_get_num_threads()) / kRowBlock * kRowBlock;
        const int64_t rows = std::max(kRowBlock, shared);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < plan_.hidden; row += rows) {
            const int64_t last = std::min(row + rows, plan_.hidden);
            for (int64_t i = 0; i < busy; i++) {
                const int64_t e = b_.busy[i], first = b_.first[e];
                const Weight down = layer.down.part(e, 0, plan_.hidden);
                GemvInputs(down, b_.gates.all() + first, b_.first[e + 1] - first)
                    .gemv(down, row, last, b_.outputs.data() + first, true);
            }
            GemvInputs(layer.out, b_.gates.all() + places, tokens_).gemv(layer.out, row, last, b_.x.all(), true);
        }
    }

    // out = silu(gate·x)·(up·x), times the weight of the place where there is one.
    void gated(const Weight& gate, const Weight& up, int64_t row, int64_t last, float* const* xs, float* const* outs,
               const int64_t* places, int64_t vectors) {
        constexpr int64_t together = 16;
        float gates[together][kRowBlock], ups[together][kRowBlock];
        float *gate_at[together], *up_at[together];
        for (int64_t v = 0; v < vectors; v += together) {
            const int64_t count = std::min(together, vectors - v);
            for (int64_t i = 0; i < count; i++) gate_at[i] = gates[i] - row, up_at[i] = ups[i] - row;
            const GemvInputs some(gate, xs + v, count);
            some.gemv(gate, row, last, gate_at);
            some.gemv(up, row, last, up_at);
            for (int64_t i = 0; i < count; i++) {
                const float weight = places ? b_.weights[places[v + i]] : 1.0f;
                each(last - row, [&](int64_t j, int64_t n) {
                    Floats g = load(gates[i] + j, n);
                    store(outs[v + i] + row + j, g * sigmoid(g) * load(ups[i] + j, n) * weight, n);
                });
            }
        }
    }

    const Plan& plan_;
    const Step& step_;
    Buffers& b_;
    const int64_t tokens_;
};

}  // namespace
