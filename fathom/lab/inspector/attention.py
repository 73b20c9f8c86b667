"""Attention weights over the cached latents, in the absorbed form of MLA.

The model's forward pass never materialises them (`ops/attention` returns their products with the values), so they are
computed here from the same modules: q_nope·W_uk against c, plus the rotated query against the shared key.

Shapes: Q chosen queries, T tokens, H heads, P nope width, R rope width, X = P+R, C latent rank, M keys kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fathom.model.mla import MultiHeadLatentAttention
from fathom.ops.rope import Rope, apply_rope

LEAST_WEIGHT = 0.01
"""Weights below this are not kept."""


class KeptAttention(NamedTuple):
    """The strongest keys of some queries, by descending weight; those not kept have the weight 0."""

    keys_HQM: Tensor
    weights_HQM: Tensor


def attention_weights(attention: MultiHeadLatentAttention, x_TD: Tensor, rope: Rope, queries: Sequence[int]) -> Tensor:
    """Softmax weights (H, Q, T) of the tokens at `queries` over all T tokens; 0 after the query.

    `x_TD` is the input of the layer's attention, the normalised residual stream; `rope` has at least its T positions.
    """
    config = attention.config
    rope = Rope(rope.cos[: len(x_TD)], rope.sin[: len(x_TD)])
    at_Q = torch.tensor(list(queries), device=x_TD.device)
    c_TC, k_rope_TR = (latent[0] for latent in attention.latents(x_TD[None], rope))
    q_QHX = attention.queries(x_TD[None, at_Q])[0]
    q_nope_QHP, q_rope_QHR = q_QHX.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
    up_HYC = attention.kv_b_proj.weight.to(c_TC.dtype).unflatten(0, (config.num_attention_heads, -1))
    q_latent_QHC = torch.einsum("qhp,hpc->qhc", q_nope_QHP, up_HYC[:, : config.qk_nope_head_dim])
    rotated_QHR = apply_rope(q_rope_QHR[None], Rope(rope.cos[at_Q], rope.sin[at_Q]))[0]
    scores_HQT = torch.einsum("qhc,tc->hqt", q_latent_QHC, c_TC) + torch.einsum("qhr,tr->hqt", rotated_QHR, k_rope_TR)
    later_QT = torch.arange(x_TD.shape[0], device=x_TD.device) > at_Q[:, None]
    scores_HQT = (scores_HQT * attention.scale).masked_fill(later_QT, float("-inf"))
    return scores_HQT.softmax(-1, dtype=torch.promote_types(scores_HQT.dtype, torch.float32))


def strongest(weights_HQT: Tensor, most: int) -> KeptAttention:
    """The `most` strongest keys of every head and query with a weight of at least `LEAST_WEIGHT`, on the CPU."""
    top = weights_HQT.topk(min(most, weights_HQT.shape[-1]), dim=-1)
    kept_HQM = torch.where(top.values >= LEAST_WEIGHT, top.values, 0.0)
    return KeptAttention(top.indices.cpu(), kept_HQM.cpu())
