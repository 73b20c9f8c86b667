"""Cross-entropy straight from hidden states: the whole (N, O) logits are never kept.

The head's product, the softmax and both their gradients are done chunk by chunk in the forward pass, so memory is one
chunk of logits whatever the vocabulary, and the backward pass only scales what is already there.

Shapes: N tokens, D hidden, O vocabulary, M tokens in a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.ops import cpu, gpu, linear

IGNORE = -100
"""Target of a position without loss."""


def linear_cross_entropy_reference(h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
    """Σ over targets of −log softmax(h·headᵀ)[target], logits in float32 at least. A scalar SUM, not a mean."""
    logits_NO = F.linear(h_ND, head_OD.to(h_ND.dtype))
    logits_NO = logits_NO.to(torch.promote_types(logits_NO.dtype, torch.float32))
    return F.cross_entropy(logits_NO, targets_N, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
    """As the reference, in chunks. Gradients reach `h_ND` and `head_OD`; targets of IGNORE cost nothing."""
    loss: Tensor = _LinearCrossEntropy.apply(h_ND, head_OD, targets_N)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=h_ND.device)
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        h_ND = h_ND.contiguous()
        weight_OD = head_OD.contiguous() if linear.multiplies(h_ND, head_OD) else head_OD.to(h_ND.dtype)
        dh_ND = torch.empty_like(h_ND) if wanted else None
        dhead_OD = torch.zeros_like(head_OD, dtype=wide) if wanted else None
        tokens = chunk_tokens(head_OD.shape[0], h_ND.device.type)
        room_MO = h_ND.new_empty(min(tokens, h_ND.shape[0]), head_OD.shape[0])  # one chunk after another lies here
        for start in range(0, h_ND.shape[0], tokens):
            chunk = slice(start, start + tokens)
            h_MD = h_ND[chunk]
            logits_MO = room_MO[: len(h_MD)]
            linear.product(h_MD, weight_OD, logits_MO)
            chunk_loss, dlogits_MO = _chunk(logits_MO, targets_N[chunk], wide)
            loss += chunk_loss
            if dh_ND is not None and dhead_OD is not None:
                linear.dgrad(dlogits_MO, weight_OD, dh_ND[chunk])
                linear.wgrad(dlogits_MO, h_MD, dhead_OD, adds=start > 0)
        if dh_ND is not None and dhead_OD is not None:
            ctx.save_for_backward(dh_ND, dhead_OD.to(head_OD.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh_ND, dhead_OD = ctx.saved_tensors
        return dh_ND * grads[0].to(dh_ND.dtype), dhead_OD * grads[0].to(dhead_OD.dtype), None


def chunk_tokens(words: int, device: str) -> int:
    """Tokens per chunk: enough for full-speed products, few enough that a chunk of logits stays in a CPU's cache.

    A GPU needs more of them for that, and each chunk adds to the whole gradient of the head: 2^29 logits, 1 GiB.
    """
    return max(1024, (1 << 29) // words) if device == "cuda" else max(256, (1 << 23) // words)


def _chunk(logits_MO: Tensor, targets_M: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """One chunk's summed loss, and that sum's gradient with respect to its logits, p − onehot, in their type."""
    if cpu.usable(logits_MO, targets_M):
        # The kernel writes where a target points; plain torch below checks for itself.
        outside_M = (targets_M < 0) | (targets_M >= logits_MO.shape[1])
        if bool((outside_M & (targets_M != IGNORE)).any()):
            raise IndexError(f"a target is neither {IGNORE} nor below the vocabulary's {logits_MO.shape[1]} words")
        losses_M = logits_MO.new_empty(logits_MO.shape[0], dtype=torch.float32)
        sizes = (*logits_MO.shape, IGNORE)
        cpu.call("cross_entropy", logits_MO.dtype, logits_MO, targets_M.contiguous(), losses_M, *sizes)
        return losses_M.sum(), logits_MO
    if logits_MO.is_cuda and wide == torch.float32 and gpu.INSTALLED:
        from fathom.ops.loss.triton import cross_entropy_  # Triton comes with torch's CUDA builds alone

        return cross_entropy_(logits_MO, targets_M.contiguous(), IGNORE).sum(), logits_MO
    log_p_MO = logits_MO.log_softmax(1, dtype=wide)
    loss = F.nll_loss(log_p_MO, targets_M, ignore_index=IGNORE, reduction="sum")
    valid_M1 = (targets_M != IGNORE).unsqueeze(1)
    dlogits_MO = log_p_MO.exp_()
    dlogits_MO.scatter_add_(1, targets_M.clamp_min(0).unsqueeze(1), torch.full_like(valid_M1, -1, dtype=wide))
    return loss, dlogits_MO.mul_(valid_M1).to(logits_MO.dtype)
