"""From logits to a token: temperature, the three usual filters, and draws that nothing else can disturb.

Filters apply in the order of `transformers`: temperature, top-k, top-p, min-p. Random numbers are
counter-based, a function of (seed, sequence, position, purpose) alone: what a sequence draws depends neither
on the others in its batch, nor on when it was drawn, nor on how many drafts were rejected before.

Shapes: B rows, T positions, O vocabulary, U purposes a random number may serve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fathom.model.layers import at_least_float32

DRAFT, ACCEPT, TOKEN = 0, 1, 2
"""Purposes of the random numbers at one position: draw the draft, judge it, draw the token itself."""

_BLOCK = 4
"""Numbers per position: what Philox makes for one value of its counter (the fourth serves no purpose)."""

_COOLEST = 1e-5
"""Smallest temperature but 0: below it, quotients of logits would leave float32."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The defaults are greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 always takes the likeliest token, whatever the filters say."""
    top_k: int = 0
    """Only the k likeliest tokens stay, and any that tie with the last of them; 0: all stay."""
    top_p: float = 1.0
    """Of what top_k left, renormalised: only the fewest likeliest tokens that reach this sum stay."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest stay."""
    seed: int = 0
    """Every draw is a function of it and of the token's place."""

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or _COOLEST <= self.temperature < math.inf
        _check(warm, "temperature", self.temperature, f"0 (greedy), or a number from {_COOLEST} up")
        whole = isinstance(self.top_k, int) and self.top_k >= 0
        _check(whole, "top_k", self.top_k, "an integer of at least 1, or 0 for no limit")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1: no limit)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (no limit) to 1")
        whole = isinstance(self.seed, int) and 0 <= self.seed < 2**64
        _check(whole, "seed", self.seed, "an integer from 0 to 2**64 − 1")


def probabilities(logits_BO: Tensor, params: SamplingParams) -> Tensor:
    """The distribution tokens are drawn from, (B, O) float32; greedy: 1 for the likeliest token, else 0."""
    if params.temperature == 0:
        best_B1 = logits_BO.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BO, dtype=torch.float32).scatter_(1, best_B1, 1.0)
    # With the largest logit at 0 no temperature can overflow.
    logits_BO = at_least_float32(logits_BO)
    logits_BO = (logits_BO - logits_BO.amax(-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < logits_BO.shape[1]:
        worst_B1 = logits_BO.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BO = logits_BO.masked_fill(logits_BO < worst_B1, -torch.inf)
    if params.top_p < 1:
        logits_BO = logits_BO.masked_fill(_outside_top_p(logits_BO.softmax(-1), params.top_p), -torch.inf)
    if params.min_p > 0:
        # The likeliest token's logit is 0, so this compares ratios of probabilities.
        logits_BO = logits_BO.masked_fill(logits_BO < math.log(params.min_p), -torch.inf)
    return logits_BO.softmax(-1).float()


def _outside_top_p(probs_BO: Tensor, top_p: float) -> Tensor:
    """Tokens before which, counted from the likeliest, `top_p` is already reached."""
    sorted_BO, order_BO = probs_BO.sort(dim=-1, descending=True, stable=True)
    before_BO = sorted_BO.cumsum(-1) - sorted_BO
    outside_BO = before_BO >= top_p
    return torch.zeros_like(outside_BO).scatter_(1, order_BO, outside_BO)


def draw(weights_BO: Tensor, uniforms_B: Tensor) -> Tensor:
    """Ids (B) by inverting the cumulative distribution at numbers in (0, 1].

    Weights need not sum to 1. A token of weight 0 is never drawn, whatever rounding does to the sums: it is
    kept from being the first to reach the number, and as 0 is no possible number, some other token reaches
    it.
    """
    cumulative_BO = weights_BO.double().cumsum(-1).masked_fill(weights_BO <= 0, 0.0)
    wanted_B1 = uniforms_B[:, None] * cumulative_BO.amax(-1, keepdim=True)
    return (cumulative_BO >= wanted_B1).long().argmax(-1)


def uniforms(seed: int, sequences: Sequence[int], firsts: Sequence[int], count: int) -> Tensor:
    """Numbers in (0, 1] for `count` positions of each sequence from its `firsts` on: (B, T, U) float64.

    The last dimension is the purpose: DRAFT, ACCEPT or TOKEN.
    """
    rows = [
        # Philox's counter is the position: neighbouring positions are neighbouring blocks of one stream.
        np.random.Generator(np.random.Philox(key=np.array([seed, sequence], dtype=np.uint64), counter=first)).random(
            (count, _BLOCK)
        )
        for sequence, first in zip(sequences, firsts, strict=True)
    ]
    return 1 - torch.from_numpy(np.stack(rows))[..., :-1]


def _check(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value!r}; it must be {expected}")
