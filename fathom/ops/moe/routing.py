"""Choosing the experts of every token: the best scores within the best groups (DeepSeek-V3 report, section 2.1.2).

Shapes: N tokens, E experts, K experts per token.
"""

import torch
from torch import Tensor

from fathom.ops import cpu, gpu
from fathom.ops.moe.reference import select_experts_reference


def select_experts(scores_NE: Tensor, choices: int, groups: int = 1, topk_group: int = 1) -> Tensor:
    """As the reference; in one pass on the CPU, and on a GPU in one kernel (torch's top-k sorts)."""
    if scores_NE.dtype == torch.float32 and gpu.usable(scores_NE):
        from fathom.ops.moe import triton_routing as routing  # Triton comes with torch's CUDA builds alone

        return routing.select_experts(scores_NE.contiguous(), choices, groups, topk_group)
    if scores_NE.is_cuda and scores_NE.dtype == torch.float32 and gpu.TRITON_INSTALLED:
        return _select_on_gpu(scores_NE, choices, groups, topk_group)
    if not cpu.usable(scores_NE) or scores_NE.dtype != torch.float32:
        return select_experts_reference(scores_NE, choices, groups, topk_group)
    ids_NK = scores_NE.new_empty(scores_NE.shape[0], choices, dtype=torch.int64)
    sizes = (*scores_NE.shape, choices, groups, topk_group)
    cpu.call("select_experts", scores_NE.dtype, scores_NE.contiguous(), ids_NK, *sizes)
    return ids_NK


def route(
    logits_NE: Tensor, bias_E: Tensor, choices: int, groups: tuple[int, int], normalise: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router from its float32 logits on, in one kernel on a GPU: ids (N, K), and weights without
    gradients; `groups`: (n_group, topk_group).
    """
    from fathom.ops.moe import triton_routing as routing  # Triton comes with torch's CUDA builds alone

    ids_NK = logits_NE.new_empty(logits_NE.shape[0], choices, dtype=torch.int64)
    weights_NK = torch.empty_like(ids_NK, dtype=torch.float32)
    routing.route(logits_NE, bias_E, None, ids_NK, weights_NK, groups, normalise, factor)
    return ids_NK, weights_NK


# A custom operator, so that torch.compile does not look inside.
@torch.library.custom_op("fathom::select_experts", mutates_args=())
def _select_on_gpu(scores_NE: Tensor, choices: int, groups: int, topk_group: int) -> Tensor:
    from fathom.ops.moe import triton_routing as routing  # Triton comes with torch's CUDA builds alone

    return routing.select_experts(scores_NE.contiguous(), choices, groups, topk_group)


@_select_on_gpu.register_fake
def _(scores_NE: Tensor, choices: int, groups: int, topk_group: int) -> Tensor:
    return scores_NE.new_empty(scores_NE.shape[0], choices, dtype=torch.int64)
