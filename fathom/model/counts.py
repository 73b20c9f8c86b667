"""What a model of a given shape costs: parameters and training FLOPs, from the formulas; no model is built.

The conventions are those of the DeepSeek-V3 report (arXiv 2412.19437, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fathom.model.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; the correction biases are counted, as in the released weights' notes."""

    total: int
    """All parameters of the main model: every layer, every expert, embedding and head; without MTP modules."""
    active: int
    """Parameters one token passes through, the input embedding and the head included."""
    embedding: int
    """The input embedding alone."""
    mtp: int
    """The MTP modules' own parameters (embedding and head are the main model's)."""
    active_matrices: int
    """Weights that multiply one token's activations: active, without embedding, norms and biases."""
    active_mtp_matrices: int
    """The same for the MTP modules, each with its use of the shared head."""


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Exact numbers of parameters, total and active per token, from the formulas."""
    d, f = config.hidden_size, config.moe_intermediate_size
    attention, attention_norms = _attention_counts(config)
    norms = attention_norms + 2 * d
    expert, shared = 3 * d * f, 3 * d * f * config.n_shared_experts
    gate = config.n_routed_experts * d
    dense_layer = attention + 3 * d * config.intermediate_size
    moe_active = attention + gate + shared + config.num_experts_per_tok * expert
    moe_total = attention + gate + shared + config.n_routed_experts * expert
    bias = 0 if config.is_v2 else config.n_routed_experts
    embedding = config.vocab_size * d
    head = 0 if config.tie_word_embeddings else embedding

    dense, sparse, modules = (
        config.first_k_dense_replace,
        config.num_moe_layers,
        config.num_nextn_predict_layers,
    )
    small = config.num_hidden_layers * norms + sparse * bias + d
    matrices = dense * dense_layer + sparse * moe_active + embedding
    return ParameterCounts(
        total=dense * dense_layer + sparse * moe_total + small + embedding + head,
        active=dense * dense_layer + sparse * moe_active + small + embedding + head,
        embedding=embedding,
        mtp=modules * (moe_total + norms + bias + 2 * d * d + 3 * d),
        active_matrices=matrices,
        active_mtp_matrices=modules * (moe_active + 2 * d * d + embedding),
    )


def _attention_counts(config: ModelConfig) -> tuple[int, int]:
    """(matrix weights, norm weights) of one layer's attention."""
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    width = heads * config.qk_head_dim
    query, query_norm = (d * width, 0) if rank is None else (d * rank + rank * width, rank)
    latent = d * config.cache_width + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + latent + heads * config.v_head_dim * d, query_norm + config.kv_lora_rank


def flops_per_token(config: ModelConfig, sequence_length: int, mtp: bool = False) -> int:
    """Model FLOPs to train on one token: 6 per active matrix weight, plus causal attention's two matmuls.

    The head counts, the embedding look-up does not; recomputation is not counted. `mtp` adds the MTP modules.
    """
    counts = parameter_counts(config)
    weights, layers = counts.active_matrices, config.num_hidden_layers
    if mtp:
        weights, layers = weights + counts.active_mtp_matrices, layers + config.num_nextn_predict_layers
    attention = 3 * layers * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * sequence_length
    return 6 * weights + attention
