"""The feed-forward of few tokens: every program takes a slice of one expert and all tokens routed to it.

An expert without tokens is not read: programs are for experts or, where there are fewer choices than experts, for
choices, of which the first for an expert serves all. The shared experts are one more, which all tokens take; a dense
layer has that one alone. Every token's K+1 results are stored side by side and summed in a fixed order, so results are
batch-invariant. The references are `routed_experts_reference` (fathom/ops/moe/reference.py) and `SwiGLU`.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, G = 2F, U width of the shared experts.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.linear.triton_tiles import Weight, load_tile, row_scales, tiling, type_of


class Shared(NamedTuple):
    """A SwiGLU's three linear layers."""

    gate_UD: Weight
    up_UD: Weight
    down_DU: Weight


class Routed(NamedTuple):
    """The routed experts, and each token's choices and weights."""

    gate_up_EGD: Weight
    down_EDF: Weight
    ids_NK: Tensor
    weights_NK: Tensor


class Scratch(NamedTuple):
    """Activations between the two launches, and the results."""

    hidden_NKF: Tensor
    hidden_NU: Tensor
    y_NKD: Tensor
    """K+1 results per token, the shared experts' last."""


def feed_forward(x_ND: Tensor, routed: Routed | None, shared: Shared, scratch: Scratch) -> None:
    """y = the weighted results of each token's experts and, last, of the shared ones; matmuls in x's type."""
    tokens, hidden = x_ND.shape
    gate, up, down = shared
    common = scratch.hidden_NU.shape[1]
    stacks = routed or Routed(gate, down, gate.data, gate.data)
    experts, choices, width = 0, 0, 0
    if routed is not None:
        experts, _, width = routed.down_EDF.data.shape
        width, choices = routed.gate_up_EGD.data.shape[1] // 2, routed.ids_NK.shape[1]
    groups = min(tokens * choices, experts)
    options = {
        "FORMAT": gate.format,
        "TYPE": type_of(x_ND.dtype),
        "CHOICES": choices,
        "PAIRS": triton.next_power_of_2(groups) if 0 < groups < experts else 0,
        "BLOCK_K": triton.next_power_of_2(max(choices, 1)),
    }
    widest = max(width, common)
    tiles = tiling(tokens, (groups + 1) * widest, hidden, x_ND.element_size())
    _up[(groups + 1, triton.cdiv(widest, tiles.outputs), triton.cdiv(tokens, tiles.tokens))](
        *(x_ND, stacks.ids_NK, stacks.weights_NK, scratch.hidden_NKF, scratch.hidden_NU),
        *(stacks.gate_up_EGD.data, stacks.gate_up_EGD.scales_or_data),
        *(gate.data, gate.scales_or_data, up.data, up.scales_or_data),
        *(tokens, groups, hidden, width, common),
        **options,
        **tiles.options(),
    )
    tiles = tiling(tokens, (groups + 1) * hidden, widest, x_ND.element_size())
    _down[(groups + 1, triton.cdiv(hidden, tiles.outputs), triton.cdiv(tokens, tiles.tokens))](
        *(scratch.hidden_NKF, scratch.hidden_NU, stacks.ids_NK, scratch.y_NKD),
        *(stacks.down_EDF.data, stacks.down_EDF.scales_or_data, down.data, down.scales_or_data),
        *(tokens, groups, hidden, width, common),
        **options,
        **tiles.options(),
    )


@triton.jit
def _tokens_of(ids, group, n_N, n_ok, CHOICES: tl.constexpr, PAIRS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A program group's expert, −1 where an earlier group has it; which tokens take it, and at which top-k rank.

    PAIRS: room for all choices where these are the groups, else 0.
    """
    expert = group.to(tl.int64)
    if PAIRS > 0:
        p_P = tl.arange(0, PAIRS)
        expert = tl.load(ids + group)
        earlier_P = (tl.load(ids + p_P, mask=p_P < group, other=-1) == expert).to(tl.int32)
        expert = tl.where(tl.max(earlier_P, 0) > 0, -1, expert)
    k_K = tl.arange(0, BLOCK_K)
    ok_NK = n_ok[:, None] & (k_K < CHOICES)[None, :]
    id_NK = tl.load(ids + n_N[:, None] * CHOICES + k_K[None, :], mask=ok_NK, other=-1)
    is_NK = ((id_NK == expert) & (expert >= 0)).to(tl.int32)
    return expert, tl.sum(is_NK, 1) > 0, tl.sum(is_NK * k_K[None, :], 1)


@triton.jit
def _up(
    x,
    ids,
    weights,
    hidden_routed,
    hidden_shared,
    gate_up,
    gate_up_scales,
    gate,
    gate_scales,
    up,
    up_scales,
    tokens,
    groups,
    inputs,
    width,
    common,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    CHOICES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """silu(gate) · up · weight of one expert."""
    group = tl.program_id(0)
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    f_F = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    takes_N, row_N, weight_N = n_N < tokens, n_N, tl.full((BLOCK_N,), 1.0, tl.float32)
    g_F, u_F, out, size = f_F, f_F, hidden_shared, common
    if CHOICES > 0:  # noqa: SIM102  (a compile-time condition, the inner one at run time)
        if group < groups:
            expert, takes_N, k_N = _tokens_of(ids, group, n_N, takes_N, CHOICES, PAIRS, BLOCK_K)
            row_N = n_N * CHOICES + k_N
            weight_N = tl.load(weights + row_N, mask=takes_N, other=0.0)
            out, size = hidden_routed, width
            gate, gate_scales, up, up_scales = gate_up, gate_up_scales, gate_up, gate_up_scales
            g_F = (expert * 2 * width).to(tl.int32) + f_F
            u_F = g_F + width
    if tl.program_id(1) * BLOCK_O >= size:
        return
    if tl.max(takes_N.to(tl.int32), 0) == 0:
        return
    f_ok = f_F < size
    gate_NF, up_NF = tl.zeros((BLOCK_N, BLOCK_O), tl.float32), tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        ok_NI = takes_N[:, None] & (i_I < inputs)[None, :]
        x_NI = tl.load(x + n_N[:, None] * inputs + i_I[None, :], mask=ok_NI, other=0.0)
        gate_FI = load_tile(gate, gate_scales, g_F, f_ok, i_I, inputs, inputs, 1, FORMAT, TYPE)
        up_FI = load_tile(up, up_scales, u_F, f_ok, i_I, inputs, inputs, 1, FORMAT, TYPE)
        gate_NF = tl.dot(x_NI, tl.trans(gate_FI), gate_NF, input_precision="ieee")
        up_NF = tl.dot(x_NI, tl.trans(up_FI), up_NF, input_precision="ieee")
    gate_NF *= row_scales(gate_scales, g_F, f_ok, FORMAT)[None, :]
    up_NF *= row_scales(up_scales, u_F, f_ok, FORMAT)[None, :]
    hidden_NF = gate_NF * tl.sigmoid(gate_NF) * up_NF * weight_N[:, None]
    at_NF = out + row_N[:, None] * size + f_F[None, :]
    tl.store(at_NF, hidden_NF.to(out.dtype.element_ty), mask=takes_N[:, None] & f_ok[None, :])


@triton.jit
def _down(
    hidden_routed,
    hidden_shared,
    ids,
    y,
    down,
    down_scales,
    shared_down,
    shared_down_scales,
    tokens,
    groups,
    outputs,
    width,
    common,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    CHOICES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One expert's results, each stored at its top-k rank among its token's."""
    group = tl.program_id(0)
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    takes_N = n_N < tokens
    row_N, k_N = n_N, tl.full((BLOCK_N,), CHOICES, tl.int32)
    hidden, size, w, scales, o_D = hidden_shared, common, shared_down, shared_down_scales, d_D
    if CHOICES > 0:  # noqa: SIM102  (a compile-time condition, the inner one at run time)
        if group < groups:
            expert, takes_N, k_N = _tokens_of(ids, group, n_N, takes_N, CHOICES, PAIRS, BLOCK_K)
            row_N = n_N * CHOICES + k_N
            hidden, size, w, scales = hidden_routed, width, down, down_scales
            o_D = (expert * outputs).to(tl.int32) + d_D
    if tl.max(takes_N.to(tl.int32), 0) == 0:
        return
    d_ok = d_D < outputs
    y_ND = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, size, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        ok_NI = takes_N[:, None] & (i_I < size)[None, :]
        hidden_NI = tl.load(hidden + row_N[:, None] * size + i_I[None, :], mask=ok_NI, other=0.0)
        tile_DI = load_tile(w, scales, o_D, d_ok, i_I, size, size, 1, FORMAT, TYPE)
        y_ND = tl.dot(hidden_NI, tl.trans(tile_DI), y_ND, input_precision="ieee")
    y_ND *= row_scales(scales, o_D, d_ok, FORMAT)[None, :]
    at_ND = y + (n_N * (CHOICES + 1) + k_N)[:, None] * outputs + d_D[None, :]
    tl.store(at_ND, y_ND, mask=takes_N[:, None] & d_ok[None, :])
