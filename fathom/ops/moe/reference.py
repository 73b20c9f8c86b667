"""The routed experts in plain torch: which experts a token takes, and what they compute (DeepSeek-V3, arXiv 2412.19437,
section 2.1.2).

Shapes: N tokens, D hidden, E experts in G groups, K experts per token, F expert width; G = 2F in weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def select_experts_reference(scores_NE: Tensor, choices: int, groups: int, topk_group: int, best: int = 2) -> Tensor:
    """Ids (N, K) of the `choices` best scores within the `topk_group` best of `groups` groups, in any order.

    A group's score is the sum of its `best` highest scores. Groups that are not chosen are masked with −inf, so that
    a negative score cannot let a masked expert in.
    """
    if topk_group < groups:
        grouped_NGe = scores_NE.unflatten(1, (groups, -1))
        group_scores_NG = grouped_NGe.topk(best, dim=-1).values.sum(-1)
        chosen_Ng = group_scores_NG.topk(topk_group, dim=-1, sorted=False).indices
        closed_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter(1, chosen_Ng, False)
        scores_NE = grouped_NGe.masked_fill(closed_NG.unsqueeze(-1), float("-inf")).flatten(1)
    return scores_NE.topk(choices, dim=-1, sorted=False).indices


def routed_experts_reference(
    x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Σ_k weight_k · down_e(silu(gate_e(x)) · up_e(x)) with e = the token's k-th expert, one expert at a time.

    `gate_up_EGD` stacks gate over up (G = 2F). An id of −1 adds nothing. Returns (N, D) in x's type.
    """
    out_ND = torch.zeros_like(x_ND)
    for expert in range(gate_up_EGD.shape[0]):
        token, choice = (topk_ids_NK == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x_ND[token], gate_up_EGD[expert]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights_NK[token, choice, None].to(x_ND.dtype)
        out_ND = out_ND.index_add(0, token, F.linear(hidden, down_EDF[expert]))
    return out_ND
