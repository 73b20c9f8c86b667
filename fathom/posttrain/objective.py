"""What each token's log-probability is worth: every objective of post-training as a file of formulas.

The gradients of SFT, GRPO, GSPO, CISPO, DPO and of the unbiased KL are all Σ cₜ·∇(−log pₜ) with cₜ detached. The
functions here compute cₜ from log-probabilities, `loss.py` does the rest. Nothing in here is differentiated.

Shapes: X targets, G samples of a group, R samples of a micro-batch.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fathom.posttrain.pack import Targets

Variant = Literal["cispo", "grpo", "gspo"]


class PolicyWeights(NamedTuple):
    """Of each target."""

    c_X: Tensor
    clipped_X: Tensor
    """Whether clipping removed or bounded its weight, bool."""


def advantages(rewards_G: Sequence[float]) -> list[float] | None:
    """Reward minus the group's mean; None where all are equal, which teaches nothing.

    Not divided by the standard deviation, which would weight problems by how far they are solved (Dr. GRPO, arXiv
    2503.20783).
    """
    if max(rewards_G) == min(rewards_G):
        return None
    mean = sum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]


def cispo(logprobs_X: Tensor, old_X: Tensor, advantages_X: Tensor, cap: float) -> PolicyWeights:
    """min(ρ, cap)·A with ρ = p/p_old: no token is dropped, its weight is bounded (arXiv 2506.13585)."""
    ratio_X = (logprobs_X - old_X).exp()
    return PolicyWeights(ratio_X.clamp_max(cap) * advantages_X, ratio_X > cap)


def grpo(logprobs_X: Tensor, old_X: Tensor, advantages_X: Tensor, low: float, high: float) -> PolicyWeights:
    """The gradient of min(ρ·A, clip(ρ, 1 − low, 1 + high)·A) with respect to log p: ρ·A, or 0 where it is clipped.

    GRPO (arXiv 2402.03300) with DAPO's two bounds (2503.14476).
    """
    ratio_X = (logprobs_X - old_X).exp()
    clipped_X = ((ratio_X > 1 + high) & (advantages_X > 0)) | ((ratio_X < 1 - low) & (advantages_X < 0))
    return PolicyWeights((ratio_X * advantages_X).masked_fill(clipped_X, 0), clipped_X)


def gspo(
    logprobs_X: Tensor, old_X: Tensor, advantages_X: Tensor, targets: Targets, low: float, high: float
) -> PolicyWeights:
    """As GRPO, with the ratio of the whole sample, s = (π/π_old)^(1/length) (arXiv 2507.18071).

    The paper averages over samples; here every token counts alike, so that a step on-policy is the policy gradient.
    """
    lengths_R = targets.sums(torch.ones_like(logprobs_X)).clamp_min(1)
    ratio_X = (targets.sums(logprobs_X - old_X) / lengths_R).exp()[targets.sample_X]
    clipped_X = ((ratio_X > 1 + high) & (advantages_X > 0)) | ((ratio_X < 1 - low) & (advantages_X < 0))
    return PolicyWeights((ratio_X * advantages_X).masked_fill(clipped_X, 0), clipped_X)


def unbiased_kl(logprobs_X: Tensor, old_X: Tensor, reference_X: Tensor) -> Tensor:
    """cₜ of KL(π‖π_ref): −ρ·log(p/p_ref), which is subtracted from reward like a cost (V3.2, arXiv 2512.02556).

    The estimator is (p/p_old)·k3 with k3 = p_ref/p − log(p_ref/p) − 1; its derivative with respect to log p is
    ρ·log(p/p_ref), the KL's own gradient whatever policy the token was sampled from. Plain k3's is not, off-policy.
    """
    return -(logprobs_X - old_X).exp() * (logprobs_X - reference_X)


def k3(logprobs_X: Tensor, other_X: Tensor) -> Tensor:
    """p_other/p − log(p_other/p) − 1: over tokens sampled from p, its mean is KL(p‖p_other)."""
    difference_X = other_X - logprobs_X
    return difference_X.expm1() - difference_X


def dpo(margins_P: Tensor, beta: float) -> Tensor:
    """The weight β·σ(−β·margin) (P pairs) of a pair: c of the chosen sample's tokens, −c of the rejected one's.

    margin = (log π − log π_ref)(chosen) − the same of rejected, of whole samples. It is the derivative of DPO's loss
    −log σ(β·margin) (arXiv 2305.18290).
    """
    return beta * torch.sigmoid(-beta * margins_P)


def overlong_penalty(length: int, limit: int, cushion: int) -> float:
    """0 up to limit − cushion tokens, then linearly to −1 at the limit (DAPO, arXiv 2503.14476)."""
    return -max(0.0, (length - (limit - cushion)) / cushion) if cushion else 0.0
