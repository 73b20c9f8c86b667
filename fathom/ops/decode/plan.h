// A model and one step of it, as fathom/engine/backends/cpu.py passes them: the same structures are declared there.
//
// Letters: N tokens, D hidden, K choices, R rope, W = C+R the width of a cached row.

#pragma once

#include "linear/gemv.h"

extern "C" {

struct Layer {
    Weight input_norm, q_a, q_a_norm, q_b, kv_a, kv_a_norm, kv_b, o;  // q_a has no data in a model without it
    Weight post_norm, router, bias, gate_up, down;                   // router has no data in a dense layer
    Weight gate, up, out;                                            // the shared experts or the dense feed-forward
};

struct Module {
    Weight embed_norm, state_norm, join;
    Layer layer;
    Weight norm;
};

struct Plan {
    int64_t hidden, heads, nope, rope, value, latent;
    int64_t experts, choices, groups, topk_group, normalise;
    int64_t page_size, slots;  // slots of one layer of the cache
    int64_t widest;            // of the feed-forwards, and of what a module joins
    double eps, latent_eps, scale, routed_scale;
    Weight embed, norm, head;
    int64_t layer_count;
    const Layer* layers;
    const Module* modules;
    const float *cosines, *sines;  // (positions, R/2)
};

// The tokens of one step. Token n stands at positions[n] of the sequence whose pages are row seq_indices[n] of
// `block_tables`.
struct Step {
    int64_t tokens, max_blocks_per_seq;
    // slot_mapping: where each token's latent is written
    const int64_t *token_ids, *positions, *slot_mapping, *seq_indices;
    const int64_t* block_tables;
    void* cache;          // (layers, slots, W)
    const float* prev_hidden;  // (N, D) hidden states that an MTP module joins to the tokens
    float* hidden;             // (N, D) final hidden states; null: a module only writes its latents
    int64_t logits_count;      // tokens whose logits are computed
    const int64_t* logits_indices;
    float* logits;  // (logits_count, vocabulary)
    int64_t* experts;  // (MoE layers, N, K) experts taken by the main model, with their weights
    float* weights;
};
}
