"""Attention over the latents of a paged cache, for the few tokens of a decoding step (DeepSeek-V2, section 2.1.2).

A token's past is split into parts that are attended in parallel and combined afterwards (as in flash-decoding): the
fewer tokens, the more parts. The reference is `latent_attention` (reference.py) on rotated queries.

Shapes: N tokens, H heads, T past tokens, C latent width, J pairs of rotary elements, W = C+2J, S parts.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.linear.triton_tiles import type_of
from fathom.ops.norm.triton import normalised
from fathom.ops.rope import Rope
from fathom.ops.rope.triton import rotated

_PROGRAMS = 1024
"""Programs that fill a GPU even if some end early: several for each of its hundred or so multiprocessors."""
_MOST_PARTS = 128
_TILES = {16: (32, 4, 2), 32: (32, 4, 2), 64: (64, 8, 2)}
"""Past tokens that a program takes at once, its warps and its pipeline stages, by heads."""


class Places(NamedTuple):
    """The tokens' positions and slots, and their sequences' block tables; int64."""

    positions_N: Tensor
    """Position in its sequence, of which a token sees all up to itself; −1 for padding."""
    slot_mapping_N: Tensor
    """Slot of the token's own latent."""
    owners_N: Tensor
    """Row of `pages` that is the token's sequence's."""
    pages: Tensor
    """The length of a row, then the rows one after another."""
    page_size: int
    first: int = 0
    """The first position that is attended."""


class Scratch(NamedTuple):
    """The results of the parts, to be combined."""

    parts_NHSC: Tensor
    log_sums_NHS: Tensor

    @staticmethod
    def of(tokens: int, heads: int, latent: int, device: torch.device) -> "Scratch":
        """For up to `tokens` tokens."""
        programs = tokens * triton.cdiv(heads, _head_block(heads))
        parts = min(_MOST_PARTS, triton.next_power_of_2(triton.cdiv(_PROGRAMS, programs)))
        parts_NHSC = torch.empty(tokens, heads, parts, latent, device=device)
        return Scratch(parts_NHSC, torch.empty(tokens, heads, parts, device=device))


def _head_block(heads: int) -> int:
    return min(64, max(16, triton.next_power_of_2(heads)))


class QueryLatent(NamedTuple):
    """A query's latent before and after its norm."""

    raw_NQ: Tensor
    weight_Q: Tensor
    normed_NQ: Tensor


def write_kv_cache(
    kv_NW: Tensor,
    norm_C: Tensor,
    eps: float,
    rope: Rope,
    positions_N: Tensor | None,
    slot_mapping_N: Tensor,
    cache_MW: Tensor,
    query: QueryLatent | None = None,
) -> None:
    """Write the tokens' latents to their slots: the first C elements normalised, the others rotated.

    `rope` is a table of all positions or, where there are no positions, has a row for every token.
    The query's latent, where there is one, is normalised on the way.
    """
    tokens, width = kv_NW.shape
    latent = norm_C.shape[0]
    raw, weight, normed = query or (kv_NW, norm_C, kv_NW)
    _write_kv_cache[(tokens,)](
        *(kv_NW, norm_C, eps, rope.cos, rope.sin, positions_N, slot_mapping_N, cache_MW),
        *(raw, weight, normed, cache_MW.stride(0), latent, (width - latent) // 2, raw.shape[1]),
        QUERY=query is not None,
        BLOCK_C=triton.next_power_of_2(latent),
        BLOCK_J=triton.next_power_of_2((width - latent) // 2),
        BLOCK_Q=triton.next_power_of_2(raw.shape[1]),
    )


def paged_latent_attention(
    q_NHC: Tensor,
    q_rope_NHR: Tensor,
    rope: Rope,
    places: Places,
    cache_MW: Tensor,
    scale: float,
    scratch: Scratch,
    out_NHC: Tensor,
) -> None:
    """Every token attends its sequence's latents, up to its own. `q_rope_NHR` is still to be rotated.

    `rope` is a table of all positions (positions, J).
    """
    tokens, heads, latent = q_NHC.shape
    pairs = q_rope_NHR.shape[-1] // 2
    block_h, parts = _head_block(heads), scratch.parts_NHSC.shape[2]
    block_t, warps, stages = _TILES[block_h]
    _attend[(tokens, triton.cdiv(heads, block_h), parts)](
        *(q_NHC, q_rope_NHR, rope.cos, rope.sin, cache_MW, places.positions_N, places.owners_N, places.pages),
        *(*scratch, scale * math.log2(math.e), heads, latent, pairs),
        *(*q_NHC.stride()[:2], *q_rope_NHR.stride()[:2], cache_MW.stride(0)),
        FIRST=places.first,
        PAGE=places.page_size,
        PARTS=parts,
        TYPE=type_of(cache_MW.dtype),
        BLOCK_H=block_h,
        BLOCK_T=block_t,
        BLOCK_C=max(16, triton.next_power_of_2(latent)),
        BLOCK_J=max(16, triton.next_power_of_2(pairs)),
        num_warps=warps,
        num_stages=stages,
    )
    block_c = min(64, triton.next_power_of_2(latent))
    _combine[(tokens, heads, triton.cdiv(latent, block_c))](
        *(*scratch, places.positions_N, out_NHC, heads, latent, *out_NHC.stride()[:2]),
        PARTS=parts,
        BLOCK_T=block_t,
        BLOCK_C=block_c,
    )


@triton.jit
def _part_length(length, PARTS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Past tokens of each part but the last."""
    return tl.cdiv(tl.cdiv(length, PARTS), BLOCK_T) * BLOCK_T


@triton.jit
def _write_kv_cache(
    kv,
    norm,
    eps,
    cosines,
    sines,
    positions,
    slots,
    cache,
    q_raw,
    q_norm,
    q_normed,
    cache_m,
    latent,
    pairs,
    q_latent,
    QUERY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    position = n
    if positions is not None:
        position = tl.maximum(tl.load(positions + n), 0)
    to = cache + tl.load(slots + n) * cache_m
    kv += n * (latent + 2 * pairs)
    c_C = tl.arange(0, BLOCK_C)
    latent_C = tl.load(kv + c_C, mask=c_C < latent, other=0.0)
    latent_C = normalised(latent_C, norm, c_C, latent, eps)
    tl.store(to + c_C, latent_C.to(cache.dtype.element_ty), mask=c_C < latent)
    if QUERY:
        q_Q = tl.arange(0, BLOCK_Q)
        query_Q = tl.load(q_raw + n * q_latent + q_Q, mask=q_Q < q_latent, other=0.0)
        query_Q = normalised(query_Q, q_norm, q_Q, q_latent, eps)
        tl.store(q_normed + n * q_latent + q_Q, query_Q.to(q_normed.dtype.element_ty), mask=q_Q < q_latent)
    j_J = tl.arange(0, BLOCK_J)
    ok = j_J < pairs
    even_J = tl.load(kv + latent + 2 * j_J, mask=ok, other=0.0).to(tl.float32)
    odd_J = tl.load(kv + latent + 2 * j_J + 1, mask=ok, other=0.0).to(tl.float32)
    cos_J = tl.load(cosines + position * pairs + j_J, mask=ok, other=0.0)
    sin_J = tl.load(sines + position * pairs + j_J, mask=ok, other=0.0)
    first_J, second_J = rotated(even_J, odd_J, cos_J, sin_J, cache.dtype.element_ty)
    tl.store(to + latent + j_J, first_J, mask=ok)
    tl.store(to + latent + pairs + j_J, second_J, mask=ok)


@triton.jit
def _rotated_queries(q_rope, q_rope_h, cosines, sines, h_H, heads, pairs, TYPE: tl.constexpr, BLOCK_J: tl.constexpr):
    """The two halves of one token's rotated queries; `cosines` and `sines` are its position's rows."""
    j_J = tl.arange(0, BLOCK_J)
    ok_HJ = (h_H < heads)[:, None] & (j_J < pairs)[None, :]
    pair_HJ = q_rope + h_H[:, None] * q_rope_h + 2 * j_J[None, :]
    even_HJ = tl.load(pair_HJ, mask=ok_HJ, other=0.0).to(tl.float32)
    odd_HJ = tl.load(pair_HJ + 1, mask=ok_HJ, other=0.0).to(tl.float32)
    cos_1J = tl.load(cosines + j_J, mask=j_J < pairs, other=0.0)[None, :]
    sin_1J = tl.load(sines + j_J, mask=j_J < pairs, other=0.0)[None, :]
    return rotated(even_HJ, odd_HJ, cos_1J, sin_1J, TYPE)


@triton.jit
def _slots(row, page, start, end, t_T, t_ok, PAGE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The slots of a tile of past tokens, by their sequence's block table, and the page of the next tile.

    Where a tile lies within one page, the page's id is loaded one iteration ahead: waiting for it would take as long as
    loading the tile.
    """
    if PAGE % BLOCK_T == 0:
        at_T = page * PAGE + start % PAGE + tl.arange(0, BLOCK_T)
        page = tl.load(row + (start + BLOCK_T) // PAGE, mask=start + BLOCK_T < end, other=0)
    else:
        at_T = tl.load(row + t_T // PAGE, mask=t_ok, other=0) * PAGE + t_T % PAGE
    return at_T, page


@triton.jit
def _latents(at_T, t_ok, latent, pairs, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr):
    """A tile of past tokens: their latents, and the halves of their rotated keys."""
    c_C, j_J = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_J)
    # Masked slots may hold anything, and NaN times 0 is NaN.
    latent_TC = tl.load(at_T[:, None] + c_C[None, :], mask=t_ok[:, None] & (c_C < latent)[None, :], other=0.0)
    at_TJ, ok_TJ = at_T[:, None] + latent + j_J[None, :], t_ok[:, None] & (j_J < pairs)[None, :]
    return latent_TC, tl.load(at_TJ, mask=ok_TJ, other=0.0), tl.load(at_TJ + pairs, mask=ok_TJ, other=0.0)


@triton.jit
def _online_softmax(score_HT, value_TC, best_H, sum_H, out_HC, TYPE: tl.constexpr):
    """Take in a tile: the largest score so far, and the sums of exponentials and of values relative to it."""
    new_H = tl.maximum(best_H, tl.max(score_HT, 1))
    prob_HT = tl.exp2(score_HT - new_H[:, None])
    keep_H = tl.exp2(best_H - new_H)
    sum_H = sum_H * keep_H + tl.sum(prob_HT, 1)
    return new_H, sum_H, tl.dot(prob_HT.to(TYPE), value_TC, out_HC * keep_H[:, None], input_precision="ieee")


@triton.jit
def _attend(
    q,
    q_rope,
    cosines,
    sines,
    cache,
    positions,
    owners,
    pages,
    parts,
    log_sums,
    scale,
    heads,
    latent,
    pairs,
    q_n,
    q_h,
    q_rope_n,
    q_rope_h,
    cache_m,
    FIRST: tl.constexpr,
    PAGE: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    n, part = tl.program_id(0), tl.program_id(2)
    position = tl.load(positions + n)
    size = _part_length(position + 1, PARTS, BLOCK_T)
    begin, end = part * size, tl.minimum(part * size + size, position + 1)
    if begin >= end:
        return
    h_H, c_C = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    ok_HC = (h_H < heads)[:, None] & (c_C < latent)[None, :]
    q_HC = tl.load(q + n * q_n + h_H[:, None] * q_h + c_C[None, :], mask=ok_HC, other=0.0).to(TYPE)
    q_rope += n * q_rope_n
    cosines += position * pairs
    sines += position * pairs
    first_HJ, second_HJ = _rotated_queries(q_rope, q_rope_h, cosines, sines, h_H, heads, pairs, TYPE, BLOCK_J)
    row = pages + 1 + tl.load(owners + n) * tl.load(pages)
    best_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    sum_H = tl.zeros((BLOCK_H,), tl.float32)
    out_HC = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    page = tl.load(row + begin // PAGE)
    for start in range(begin, end, BLOCK_T):
        t_T = start + tl.arange(0, BLOCK_T)
        t_ok = (t_T >= FIRST) & (t_T < end)
        at_T, page = _slots(row, page, start, end, t_T, t_ok, PAGE, BLOCK_T)
        latent_TC, first_TJ, second_TJ = _latents(cache + at_T * cache_m, t_ok, latent, pairs, BLOCK_C, BLOCK_J)
        score_HT = tl.dot(q_HC, tl.trans(latent_TC), input_precision="ieee")
        score_HT = tl.dot(first_HJ, tl.trans(first_TJ), score_HT, input_precision="ieee")
        score_HT = tl.dot(second_HJ, tl.trans(second_TJ), score_HT, input_precision="ieee")
        score_HT = tl.where(t_ok[None, :], score_HT * scale, float("-inf"))
        best_H, sum_H, out_HC = _online_softmax(score_HT, latent_TC, best_H, sum_H, out_HC, TYPE)
    at_H = ((n * heads + h_H) * PARTS + part).to(tl.int64)
    tl.store(parts + at_H[:, None] * latent + c_C[None, :], out_HC / sum_H[:, None], mask=ok_HC)
    tl.store(log_sums + at_H, best_H + tl.log2(sum_H), mask=h_H < heads)


@triton.jit
def _combine(
    parts,
    log_sums,
    positions,
    out,
    heads,
    latent,
    out_n,
    out_h,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    n, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(positions + n) + 1
    count = tl.cdiv(length, tl.maximum(_part_length(length, PARTS, BLOCK_T), 1))
    s_S, c_C = tl.arange(0, PARTS), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    s_ok, c_ok = s_S < count, c_C < latent
    at_S = ((n * heads + head) * PARTS).to(tl.int64) + s_S
    log_sum_S = tl.load(log_sums + at_S, mask=s_ok, other=float("-inf"))
    share_S = tl.exp2(log_sum_S - tl.max(log_sum_S, 0))
    part_SC = tl.load(parts + at_S[:, None] * latent + c_C[None, :], mask=s_ok[:, None] & c_ok[None, :], other=0.0)
    out_C = tl.sum(part_SC * share_S[:, None], 0) / tl.sum(share_S, 0)
    tl.store(out + n * out_n + head * out_h + c_C, out_C.to(out.dtype.element_ty), mask=c_ok)
