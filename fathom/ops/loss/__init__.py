"""Losses and log-probabilities straight from hidden states: the whole (N, O) logits never exist.

`linear_cross_entropy` is pretraining's: one sum, whose gradients are made chunk by chunk in the forward pass, so that
the backward pass only scales them. `linear_logprobs` gives every token's log-probability and entropy, for objectives
that weight tokens one by one (SFT, GRPO, DPO); its backward pass recomputes the logits chunk by chunk. Either way
memory is one chunk of logits whatever the vocabulary.

Shapes: N tokens, D hidden, O vocabulary, M tokens in a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops import cpu, gpu, linear
from fathom.ops.loss.reference import (
    IGNORE,
    REMOVED,
    SamplingMask,
    linear_cross_entropy_reference,
    linear_logprobs_reference,
)

__all__ = [
    "IGNORE",
    "SamplingMask",
    "chunk_tokens",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "log_softmax_chunks",
]


def linear_cross_entropy(h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
    """As the reference, in chunks. Gradients reach `h_ND` and `head_OD`; targets of IGNORE cost nothing."""
    loss: Tensor = _LinearCrossEntropy.apply(h_ND, head_OD, targets_N)
    return loss


def linear_logprobs(
    h_ND: Tensor,
    head_OD: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
    mask: SamplingMask | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference, in chunks, with gradients of both results to `h_ND` and `head_OD`.

    Raises ValueError for a temperature that is not above 0, IndexError for a target outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    logprobs_N, entropies_N = _LinearLogprobs.apply(h_ND, head_OD, targets_N, temperature, mask)
    return logprobs_N, entropies_N


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, head_OD: Tensor, targets_N: Tensor) -> Tensor:
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=h_ND.device)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        h_ND = h_ND.contiguous()
        weight_OD = head_OD.contiguous() if linear.has_kernel(h_ND, head_OD) else head_OD.to(h_ND.dtype)
        dh_ND = torch.empty_like(h_ND) if needs_grad else None
        dhead_OD = torch.zeros_like(head_OD, dtype=wide) if needs_grad else None
        tokens = chunk_tokens(head_OD.shape[0], h_ND.device.type)
        room_MO = h_ND.new_empty(min(tokens, h_ND.shape[0]), head_OD.shape[0])  # reused by every chunk
        for start in range(0, h_ND.shape[0], tokens):
            chunk = slice(start, start + tokens)
            h_MD = h_ND[chunk]
            logits_MO = room_MO[: len(h_MD)]
            linear.fprop(h_MD, weight_OD, logits_MO)
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
    """Tokens per chunk: enough for matmuls at full speed, few enough that a chunk of logits stays in a CPU's cache.

    A GPU needs more tokens, as every chunk adds to the whole gradient of the head: 2^29 logits, 1 GiB in bfloat16.
    """
    return max(1024, (1 << 29) // words) if device == "cuda" else max(256, (1 << 23) // words)


def _chunk(logits_MO: Tensor, targets_M: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """One chunk's summed loss, and that sum's gradient with respect to its logits, p − onehot, in their type."""
    if cpu.usable(logits_MO, targets_M):
        _check_targets(targets_M, logits_MO.shape[1])  # the kernel writes where a target points
        losses_M = logits_MO.new_empty(logits_MO.shape[0], dtype=torch.float32)
        sizes = (*logits_MO.shape, IGNORE)
        cpu.call("cross_entropy", logits_MO.dtype, logits_MO, targets_M.contiguous(), losses_M, *sizes)
        return losses_M.sum(), logits_MO
    if logits_MO.is_cuda and wide == torch.float32 and gpu.TRITON_INSTALLED:
        from fathom.ops.loss.triton import cross_entropy_  # Triton comes with torch's CUDA builds alone

        return cross_entropy_(logits_MO, targets_M.contiguous(), IGNORE).sum(), logits_MO
    log_p_MO = logits_MO.log_softmax(1, dtype=wide)
    loss = F.nll_loss(log_p_MO, targets_M, ignore_index=IGNORE, reduction="sum")
    valid_M1 = (targets_M != IGNORE).unsqueeze(1)
    dlogits_MO = log_p_MO.exp_()
    dlogits_MO.scatter_add_(1, targets_M.clamp_min(0).unsqueeze(1), torch.full_like(valid_M1, -1, dtype=wide))
    return loss, dlogits_MO.mul_(valid_M1).to(logits_MO.dtype)


def _check_targets(targets_M: Tensor, words: int) -> None:
    outside_M = (targets_M < 0) | (targets_M >= words)
    if bool((outside_M & (targets_M != IGNORE)).any()):
        raise IndexError(f"a target is neither {IGNORE} nor below the vocabulary's {words} words")


class _LinearLogprobs(torch.autograd.Function):
    """Keeps its inputs and two values a token."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head_OD: Tensor, targets_N: Tensor, temperature: float, mask: SamplingMask | None
    ) -> tuple[Tensor, Tensor]:
        if not targets_N.is_cuda:
            _check_targets(targets_N, head_OD.shape[0])
        h_ND = h_ND.contiguous()
        wide = torch.promote_types(h_ND.dtype, torch.float32)
        logprobs_N, entropies_N = (torch.empty(len(h_ND), dtype=wide, device=h_ND.device) for _ in range(2))
        for chunk, log_p_MO, _ in log_softmax_chunks(h_ND, head_OD, temperature, mask):
            ignored_M = targets_N[chunk] == IGNORE
            target_M1 = targets_N[chunk].masked_fill(ignored_M, 0).unsqueeze(1)
            logprobs_N[chunk] = log_p_MO.gather(1, target_M1).squeeze(1).masked_fill(ignored_M, 0)
            entropy_M = -log_p_MO.exp().mul_(log_p_MO).sum(1)
            entropies_N[chunk] = entropy_M.masked_fill(ignored_M, 0)
        ctx.save_for_backward(h_ND, head_OD, targets_N, entropies_N)
        ctx.temperature, ctx.mask = temperature, mask
        ctx.set_materialize_grads(False)
        return logprobs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs_N: Tensor | None, dentropies_N: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        h_ND, head_OD, targets_N, entropies_N = ctx.saved_tensors
        h_needs_grad, head_needs_grad, *_ = ctx.needs_input_grad
        dh_ND = torch.empty_like(h_ND) if h_needs_grad else None
        dhead_OD = torch.zeros_like(head_OD, dtype=entropies_N.dtype) if head_needs_grad else None
        for chunk, log_p_MO, weight_OD in log_softmax_chunks(h_ND, head_OD, ctx.temperature, ctx.mask):
            upstream = [None if d is None else d[chunk] for d in (dlogprobs_N, dentropies_N)]
            dlogits_MO = _logits_gradient(log_p_MO, targets_N[chunk], entropies_N[chunk], *upstream)
            dlogits_MO = dlogits_MO.div_(ctx.temperature).to(h_ND.dtype)
            if dh_ND is not None:
                linear.dgrad(dlogits_MO, weight_OD, dh_ND[chunk])
            if dhead_OD is not None:
                linear.wgrad(dlogits_MO, h_ND[chunk], dhead_OD, adds=chunk.start > 0)
        return dh_ND, None if dhead_OD is None else dhead_OD.to(head_OD.dtype), None, None, None


def log_softmax_chunks(
    h_ND: Tensor, head_OD: Tensor, temperature: float, mask: SamplingMask | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which tokens, their log-probabilities (M, O) in float32 at least, and the head as `linear`'s matmuls take it."""
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    weight_OD = head_OD.contiguous() if linear.has_kernel(h_ND, head_OD) else head_OD.to(h_ND.dtype)
    tokens = chunk_tokens(head_OD.shape[0], h_ND.device.type)
    for start in range(0, len(h_ND), tokens):
        chunk = slice(start, start + tokens)
        logits_MO = h_ND.new_empty(len(h_ND[chunk]), len(head_OD))
        linear.fprop(h_ND[chunk], weight_OD, logits_MO)
        logits_MO = logits_MO.to(wide).div_(temperature)
        if mask is not None:
            logits_MO.masked_fill_(mask.removed(start, start + len(logits_MO), len(head_OD)), REMOVED)
        log_p_MO = logits_MO.log_softmax(1)
        del logits_MO
        yield chunk, log_p_MO, weight_OD


def _logits_gradient(
    log_p_MO: Tensor, targets_M: Tensor, entropy_M: Tensor, dlogprobs_M: Tensor | None, dentropies_M: Tensor | None
) -> Tensor:
    """Gradient of Σ dlogprob·logprob + dentropy·entropy for z = logits / temperature; overwrites `log_p_MO`.

    ∂logprob/∂z = onehot − p and ∂entropy/∂z = −p·(log p + entropy).
    """
    ignored_M = targets_M == IGNORE
    zero_M = torch.zeros_like(entropy_M)
    a_M, b_M = ((zero_M if d is None else d.masked_fill(ignored_M, 0)) for d in (dlogprobs_M, dentropies_M))
    p_MO = log_p_MO.exp()
    # dz = a·onehot − p·(a + b·entropy + b·log p)
    dlogits_MO = log_p_MO.mul_(b_M[:, None]).add_((a_M + b_M * entropy_M)[:, None]).mul_(p_MO).neg_()
    return dlogits_MO.scatter_add_(1, targets_M.masked_fill(ignored_M, 0)[:, None], a_M[:, None])
