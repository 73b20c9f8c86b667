"""Load balancing of the experts: the bias update and the small sequence-wise loss (DeepSeek-V3 report, 2.1.2).

Auxiliary-loss-free balancing (arXiv 2408.15664): after every optimizer step each expert's selection bias moves by a
fixed step, up where its load was below the mean, down where above. It is a pure function of the load over the WHOLE
global batch, so gradient accumulation, recomputation and data parallelism do not change it.

Shapes: B sequences, S tokens each, N = B·S tokens, G segments, E experts, K experts per token.
"""

import torch
from torch import Tensor

from fathom.model.segments import segment_ids, segment_lengths
from fathom.ops.moe import select_experts


def updated_bias(bias_E: Tensor, tokens_per_expert_E: Tensor, speed: float) -> Tensor:
    """b + γ·sign(mean load − load), where the load is `tokens_per_expert_E` of one step's whole global batch.

    Works on (E) or, all layers at once, on (L, E).
    """
    tokens_per_expert_E = tokens_per_expert_E.to(torch.float64)
    return bias_E + speed * torch.sign(tokens_per_expert_E.mean(-1, keepdim=True) - tokens_per_expert_E).to(
        bias_E.dtype
    )


def sequence_balance_loss(scores_BSE: Tensor, experts_per_token: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """Σ_i f_i·P_i, averaged over the B sequences (a scalar, 1 when perfectly even); multiply by α to use it.

    f_i = E/(K·S) · tokens that would choose expert i by the plain scores, P_i = mean over the sequence of the
    normalised score. Only P carries a gradient. With `cu_seqlens` the sequences are its G segments.
    """
    if cu_seqlens is not None:
        return _segment_balance_loss(scores_BSE.flatten(0, 1), experts_per_token, cu_seqlens)
    length, experts = scores_BSE.shape[1:]
    plain_NK = select_experts(scores_BSE.detach().flatten(0, 1), experts_per_token)
    plain_BSK = plain_NK.unflatten(0, scores_BSE.shape[:2])
    chosen_BE = torch.zeros_like(scores_BSE).scatter(2, plain_BSK, 1.0).sum(1)
    f_BE = chosen_BE * (experts / (experts_per_token * length))
    p_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (f_BE * p_BE).sum(-1).mean()


def _segment_balance_loss(scores_NE: Tensor, experts_per_token: int, cu_seqlens: Tensor) -> Tensor:
    tokens, experts = scores_NE.shape
    ids_N, lengths_G1 = segment_ids(cu_seqlens, tokens), segment_lengths(cu_seqlens)[:, None]
    plain_NK = select_experts(scores_NE.detach(), experts_per_token)
    chosen_NE = torch.zeros_like(scores_NE).scatter(1, plain_NK, 1.0)
    none_GE = scores_NE.new_zeros(len(lengths_G1), experts)
    f_GE = none_GE.index_add(0, ids_N, chosen_NE) * experts / (experts_per_token * lengths_G1)
    p_GE = none_GE.index_add(0, ids_N, scores_NE / scores_NE.sum(-1, keepdim=True)) / lengths_G1
    return (f_GE * p_GE).sum(-1).mean()


def max_violation(tokens_per_expert_E: Tensor) -> Tensor:
    """MaxVio = max load / mean load − 1 over the last dimension: 0 is perfect balance (arXiv 2408.15664, section 4)."""
    tokens_per_expert_E = tokens_per_expert_E.to(torch.float64)
    return tokens_per_expert_E.amax(-1) / tokens_per_expert_E.mean(-1) - 1
