"""Choosing experts on a GPU, one token per program; the references are in fathom/ops/moe/reference.py and the router.

Shapes: N tokens, E experts in G groups of X, K experts per token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def select_experts(scores_NE: Tensor, choices: int, groups: int, topk_group: int) -> Tensor:
    """As `select_experts_reference` with the two best scores of a group; (N, K)."""
    tokens, experts = scores_NE.shape
    ids_NK = torch.empty(tokens, choices, dtype=torch.int64, device=scores_NE.device)
    if tokens:
        _select[(tokens,)](scores_NE, ids_NK, scores_NE.stride(0), **_sizes(experts, choices, groups, topk_group))
    return ids_NK


def route(
    logits_NE: Tensor,
    bias_E: Tensor,
    positions_N: Tensor | None,
    ids_NK: Tensor,
    weights_NK: Tensor,
    groups: tuple[int, int],
    normalise: bool,
    factor: float,
) -> None:
    """The router from its logits on: the chosen experts and their weights; −1 for padding (position −1).

    `groups`: (n_group, topk_group).
    """
    tokens, experts = logits_NE.shape
    _route[(tokens,)](
        *(logits_NE, bias_E, positions_N, ids_NK, weights_NK, logits_NE.stride(0), factor),
        NORMALISE=normalise,
        **_sizes(experts, ids_NK.shape[1], *groups),
    )


def _sizes(experts: int, choices: int, groups: int, topk_group: int) -> dict[str, int]:
    return {
        "CHOICES": choices,
        "GROUPS": groups,
        "TOPK_GROUP": topk_group,
        "SIZE": experts // groups,
        "BLOCK_G": triton.next_power_of_2(groups),
        "BLOCK_X": triton.next_power_of_2(experts // groups),
        "BLOCK_K": triton.next_power_of_2(choices),
        "num_warps": 1,
    }


@triton.jit
def _experts(GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_X: tl.constexpr):
    """Every expert's id, by its group, and which of these exist."""
    g_G, x_X = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X)
    return g_G[:, None] * SIZE + x_X[None, :], (g_G < GROUPS)[:, None] & (x_X < SIZE)[None, :]


@triton.jit
def _topk_in_groups(
    score_GX,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The experts (K) with the best scores within the best groups."""
    minus = float("-inf")
    g_G, x_X, k_K = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_K)
    if TOPK_GROUP < GROUPS:
        best_G, at_G = tl.max(score_GX, 1, return_indices=True)
        second_G = tl.max(tl.where(x_X[None, :] == at_G[:, None], minus, score_GX), 1)
        group_G = tl.where(g_G < GROUPS, best_G + second_G, minus)
        chosen_G = tl.zeros((BLOCK_G,), tl.int1)
        for _ in tl.static_range(TOPK_GROUP):
            chosen = tl.argmax(group_G, 0)
            chosen_G = chosen_G | (g_G == chosen)
            group_G = tl.where(g_G == chosen, minus, group_G)
        score_GX = tl.where(chosen_G[:, None], score_GX, minus)
    score_Y = tl.reshape(score_GX, (BLOCK_G * BLOCK_X,))
    y_Y = tl.arange(0, BLOCK_G * BLOCK_X)
    ids_K = tl.zeros((BLOCK_K,), tl.int32)
    for k in tl.static_range(CHOICES):
        chosen = tl.argmax(score_Y, 0)
        ids_K = tl.where(k_K == k, chosen // BLOCK_X * SIZE + chosen % BLOCK_X, ids_K)
        score_Y = tl.where(y_Y == chosen, minus, score_Y)
    return ids_K


@triton.jit
def _select(
    scores,
    ids,
    scores_n,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    e_GX, ok_GX = _experts(GROUPS, SIZE, BLOCK_G, BLOCK_X)
    score_GX = tl.load(scores + n * scores_n + e_GX, mask=ok_GX, other=float("-inf"))
    ids_K = _topk_in_groups(score_GX, CHOICES, GROUPS, TOPK_GROUP, SIZE, BLOCK_G, BLOCK_X, BLOCK_K)
    k_K = tl.arange(0, BLOCK_K)
    tl.store(ids + n * CHOICES + k_K, ids_K.to(tl.int64), mask=k_K < CHOICES)


@triton.jit
def _route(
    logits,
    bias,
    positions,
    ids,
    weights,
    logits_n,
    factor,
    NORMALISE: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    e_GX, ok_GX = _experts(GROUPS, SIZE, BLOCK_G, BLOCK_X)
    affinity_GX = tl.sigmoid(tl.load(logits + n * logits_n + e_GX, mask=ok_GX, other=0.0))
    biased_GX = affinity_GX + tl.load(bias + e_GX, mask=ok_GX, other=0.0)
    biased_GX = tl.where(ok_GX, biased_GX, float("-inf"))
    ids_K = _topk_in_groups(biased_GX, CHOICES, GROUPS, TOPK_GROUP, SIZE, BLOCK_G, BLOCK_X, BLOCK_K)
    k_K = tl.arange(0, BLOCK_K)
    k_ok = k_K < CHOICES
    weight_K = tl.where(k_ok, tl.sigmoid(tl.load(logits + n * logits_n + ids_K, mask=k_ok, other=0.0)), 0.0)
    if NORMALISE:
        weight_K = weight_K / (tl.sum(weight_K, 0) + 1e-20)
    if positions is not None:
        ids_K = tl.where(tl.load(positions + n) >= 0, ids_K, -1)
    tl.store(ids + n * CHOICES + k_K, ids_K.to(tl.int64), mask=k_ok)
    tl.store(weights + n * CHOICES + k_K, weight_K * factor, mask=k_ok)
