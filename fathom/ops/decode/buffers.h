// What passes between the phases of a decode step.
//
// Letters: N tokens, K choices.

#pragma once

#include "decode/plan.h"

#include <vector>

namespace {

constexpr int64_t kRowBlock = 32;  // rows of a matrix a thread takes at a time
constexpr int64_t kPadding = 16;   // keeps the same column of neighbouring rows out of the same cache set

// (rows, columns) floats, rows padded apart.
class Rows {
  public:
    void shape(int64_t rows, int64_t columns) {
        stride_ = (columns + kPadding - 1) / kPadding * kPadding + kPadding;
        if (int64_t(elements_.size()) < rows * stride_) elements_.resize(rows * stride_);
        at_.resize(rows);
        for (int64_t i = 0; i < rows; i++) at_[i] = elements_.data() + i * stride_;
    }
    float* operator[](int64_t row) { return at_[row]; }
    float* const* all() { return at_.data(); }

  private:
    std::vector<float> elements_;
    std::vector<float*> at_;
    int64_t stride_ = 0;
};

// What passes between the phases; kept from call to call.
struct Buffers {
    Rows x, normed, q_a, kv, q, queries, parts, heads, router, gates;
    std::vector<float> highest, total;          // of each part: the largest score, the sum of the powers
    std::vector<int64_t> part_token, part_first;  // of each part: its token, and the first position it attends
    std::vector<int64_t> parts_before;          // of each token: the parts of the tokens before it
    std::vector<int64_t> chosen, order, first;  // (N, K) experts; places sorted by expert; where each expert's begin
    std::vector<float> weights;
    std::vector<int64_t> busy;                  // experts with tokens
    std::vector<float*> inputs, outputs;        // rows of `normed` in the order of the places; of `gates` likewise
};

void make_room(Buffers& b, const Plan& plan, int64_t tokens) {
    const Layer& any = plan.layers[0];
    b.x.shape(tokens, plan.hidden);
    b.normed.shape(tokens, plan.hidden);
    b.q_a.shape(tokens, any.q_a.rows);
    b.kv.shape(tokens, plan.latent + plan.rope);
    b.q.shape(tokens, plan.heads * (plan.nope + plan.rope));
    b.queries.shape(tokens * plan.heads, plan.latent + plan.rope);
    b.heads.shape(tokens, plan.heads * plan.value);
    b.router.shape(tokens, plan.experts);
    b.gates.shape(tokens * (plan.choices + 1), plan.widest);
    b.chosen.resize(tokens * plan.choices);
    b.order.resize(tokens * plan.choices);
    b.weights.resize(tokens * plan.choices);
    b.first.resize(plan.experts + 1);
}

}  // namespace
