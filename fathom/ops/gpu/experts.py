"""The feed-forward of few tokens: every program takes a slice of one expert and all tokens that chose it.

An expert that nobody chose is not read. The shared experts are one more, which everybody takes; a dense layer has that
one alone. Every token's K+1 results are left side by side and summed in a fixed order, so that they do not depend on
the company. The references are `routed_experts_reference` (fathom/ops/experts.py) and `SwiGLU`.

Shapes: N tokens, D hidden, E experts, K experts per token, F expert width, G = 2F, U width of the shared experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.gpu.linear import Norm, token_block
from fathom.ops.gpu.tiles import Weight, load_tile, row_scales, type_of


class Shared(NamedTuple):
    """A SwiGLU's three maps."""

    gate_UD: Weight
    up_UD: Weight
    down_DU: Weight


class Routed(NamedTuple):
    """The routed experts and who takes them, with what weights."""

    gate_up_EGD: Weight
    down_EDF: Weight
    ids_NK: Tensor
    weights_NK: Tensor


class Scratch(NamedTuple):
    """What lies between the two launches, and after them."""

    hidden_NKF: Tensor
    hidden_NU: Tensor
    y_NKD: Tensor
    """K+1 results a token, the shared experts' last."""


def feed_forward(
    x_ND: Tensor, norm: Norm, routed: Routed | None, shared: Shared, scratch: Scratch, dtype: torch.dtype
) -> None:
    """x += shared(norm(x)) + Σ_k weight_k · expert_k(norm(x)), multiplying in `dtype`; x is float32."""
    tokens, hidden = x_ND.shape
    gate, up, down = shared
    common = scratch.hidden_NU.shape[1]
    stacks = routed or Routed(gate, down, gate.numbers, gate.numbers)
    experts, choices, width = (0, 0, 0) if routed is None else (*routed.down_EDF.numbers.shape[:1], *_sizes(routed))
    block_n = token_block(tokens)
    sizes = {
        "FORMAT": gate.format,
        "TYPE": type_of(dtype),
        "CHOICES": choices,
        "BLOCK_N": block_n,
        "BLOCK_K": triton.next_power_of_2(max(choices, 1)),
        "BLOCK_O": 16 if block_n <= 32 else 32,
        "BLOCK_I": max(32, min((256 if block_n == 16 else 128) * 2 // dtype.itemsize, 256)),
        "num_warps": 4,
        "num_stages": 3,
    }
    tiles = triton.cdiv(max(width, common), sizes["BLOCK_O"]), triton.cdiv(tokens, block_n)
    _up[(experts + 1, *tiles)](
        *(x_ND, norm.weight_I, norm.eps, stacks.ids_NK, stacks.weights_NK, scratch.hidden_NKF, scratch.hidden_NU),
        *(stacks.gate_up_EGD.numbers, stacks.gate_up_EGD.scales_or_numbers),
        *(gate.numbers, gate.scales_or_numbers, up.numbers, up.scales_or_numbers),
        *(tokens, experts, hidden, width, common),
        **sizes,
    )
    tiles = triton.cdiv(hidden, sizes["BLOCK_O"]), triton.cdiv(tokens, block_n)
    _down[(experts + 1, *tiles)](
        *(scratch.hidden_NKF, scratch.hidden_NU, stacks.ids_NK, scratch.y_NKD),
        *(stacks.down_EDF.numbers, stacks.down_EDF.scales_or_numbers, down.numbers, down.scales_or_numbers),
        *(tokens, experts, hidden, width, common),
        **sizes,
    )
    block_d = min(1024, triton.next_power_of_2(hidden))
    _add[(tokens, triton.cdiv(hidden, block_d))](x_ND, scratch.y_NKD, hidden, RESULTS=choices + 1, BLOCK_D=block_d)


def _sizes(routed: Routed) -> tuple[int, int]:
    """Choices of a token, width of an expert."""
    return routed.ids_NK.shape[1], routed.gate_up_EGD.numbers.shape[1] // 2


@triton.jit
def _who(ids, n_N, n_ok, expert, CHOICES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which tokens take the expert, and as their how-manieth choice."""
    k_K = tl.arange(0, BLOCK_K)
    ok_NK = n_ok[:, None] & (k_K < CHOICES)[None, :]
    id_NK = tl.load(ids + n_N[:, None] * CHOICES + k_K[None, :], mask=ok_NK, other=-1)
    is_NK = (id_NK == expert).to(tl.int32)
    return tl.sum(is_NK, 1) > 0, tl.sum(is_NK * k_K[None, :], 1)


@triton.jit
def _up(
    x,
    norm,
    eps,
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
    experts,
    inputs,
    width,
    common,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """silu(gate) · up · weight of one expert."""
    expert = tl.program_id(0)
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    f_F = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    takes_N = n_N < tokens
    row_N = n_N
    weight_N = tl.full((BLOCK_N,), 1.0, tl.float32)
    g_F, u_F, out, size = f_F, f_F, hidden_shared, common
    if CHOICES > 0:
        if expert < experts:
            takes_N, k_N = _who(ids, n_N, takes_N, expert, CHOICES, BLOCK_K)
            row_N = n_N * CHOICES + k_N
            weight_N = tl.load(weights + row_N, mask=takes_N, other=0.0)
            out, size = hidden_routed, width
            gate, gate_scales, up, up_scales = gate_up, gate_up_scales, gate_up, gate_up_scales
            g_F = expert * 2 * width + f_F
            u_F = g_F + width
    if tl.program_id(1) * BLOCK_O >= size:
        return
    if tl.max(takes_N.to(tl.int32), 0) == 0:
        return
    f_ok = f_F < size
    gate_NF = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    up_NF = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    square_N = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, inputs, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        i_ok = i_I < inputs
        x_NI = tl.load(x + n_N[:, None] * inputs + i_I[None, :], mask=takes_N[:, None] & i_ok[None, :], other=0.0)
        square_N += tl.sum(x_NI * x_NI, 1)
        x_NI = (x_NI * tl.load(norm + i_I, mask=i_ok, other=0.0).to(tl.float32)[None, :]).to(TYPE)
        gate_FI = load_tile(gate, gate_scales, g_F, f_ok, i_I, inputs, inputs, 1, FORMAT, TYPE)
        up_FI = load_tile(up, up_scales, u_F, f_ok, i_I, inputs, inputs, 1, FORMAT, TYPE)
        gate_NF = tl.dot(x_NI, tl.trans(gate_FI), gate_NF, input_precision="ieee")
        up_NF = tl.dot(x_NI, tl.trans(up_FI), up_NF, input_precision="ieee")
    inverse_N1 = tl.rsqrt(square_N / inputs + eps)[:, None]
    gate_NF *= inverse_N1 * row_scales(gate_scales, g_F, f_ok, FORMAT)[None, :]
    up_NF *= inverse_N1 * row_scales(up_scales, u_F, f_ok, FORMAT)[None, :]
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
    experts,
    outputs,
    width,
    common,
    FORMAT: tl.constexpr,
    TYPE: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One expert's results, each to its place among its token's."""
    expert = tl.program_id(0)
    n_N = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    d_D = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    takes_N = n_N < tokens
    row_N, k_N = n_N, tl.full((BLOCK_N,), CHOICES, tl.int32)
    hidden, size, w, scales, o_D = hidden_shared, common, shared_down, shared_down_scales, d_D
    if CHOICES > 0:
        if expert < experts:
            takes_N, k_N = _who(ids, n_N, takes_N, expert, CHOICES, BLOCK_K)
            row_N = n_N * CHOICES + k_N
            hidden, size, w, scales = hidden_routed, width, down, down_scales
            o_D = expert * outputs + d_D
    if tl.max(takes_N.to(tl.int32), 0) == 0:
        return
    d_ok = d_D < outputs
    y_ND = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, size, BLOCK_I):
        i_I = start + tl.arange(0, BLOCK_I)
        ok_NI = takes_N[:, None] & (i_I < size)[None, :]
        hidden_NI = tl.load(hidden + row_N[:, None] * size + i_I[None, :], mask=ok_NI, other=0.0).to(TYPE)
        tile_DI = load_tile(w, scales, o_D, d_ok, i_I, size, size, 1, FORMAT, TYPE)
        y_ND = tl.dot(hidden_NI, tl.trans(tile_DI), y_ND, input_precision="ieee")
    y_ND *= row_scales(scales, o_D, d_ok, FORMAT)[None, :]
    at_ND = y + (n_N * (CHOICES + 1) + k_N)[:, None] * outputs + d_D[None, :]
    tl.store(at_ND, y_ND, mask=takes_N[:, None] & d_ok[None, :])


@triton.jit
def _add(x, y, hidden, RESULTS: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d_D < hidden
    x_D = tl.load(x + n * hidden + d_D, mask=ok, other=0.0)
    for k in tl.static_range(RESULTS):
        x_D += tl.load(y + (n * RESULTS + k) * hidden + d_D, mask=ok, other=0.0)
    tl.store(x + n * hidden + d_D, x_D, mask=ok)
