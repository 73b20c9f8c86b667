"""Queries, keys and values as fused attention takes them, in one pass over each.

Queries are rotated, keys are concatenated from their head's part and the shared rotated part, and values are padded
with zeros where attention needs them as wide as keys. The reference is `heads_reference`
(fathom/ops/attention/reference.py). No gradients.

Shapes: B batch, S query length, T key length, H heads, P nope width, R rope width, J = R/2 pairs, X = P+R, V value
width, Y = P+V, Z width of the values that are returned.
"""

import triton
import triton.language as tl
from torch import Tensor

from fathom.ops.rope import Rope
from fathom.ops.rope.triton import rotated

_ELEMENTS = 2048
"""Elements of the heads' nope parts that a program takes at once."""


def heads(
    q_BSHX: Tensor, kv_BTHY: Tensor, k_rope_BTR: Tensor, rope: Rope, pads: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As `heads_reference`; with `pads` the values are as wide as the keys (Z = X), else a view."""
    q_BSHX, kv_BTHY = q_BSHX.contiguous(), kv_BTHY.contiguous()
    cos, sin = (t.contiguous() for t in rope)
    k_rope_NR = k_rope_BTR.flatten(0, 1)
    batch, length, count, width = q_BSHX.shape
    keys, rotated = kv_BTHY.shape[1], k_rope_BTR.shape[-1]
    nope = width - rotated
    value = kv_BTHY.shape[-1] - nope
    rotated_BSHX, k_BTHX = q_BSHX.new_empty(q_BSHX.shape), kv_BTHY.new_empty(batch, keys, count, width)
    v_BTHZ = kv_BTHY.new_empty(batch, keys, count, width) if pads else kv_BTHY[..., nope:]
    block_p = triton.next_power_of_2(nope)
    block_h = min(triton.next_power_of_2(count), max(1, _ELEMENTS // block_p))
    _heads[(batch * max(length, keys), triton.cdiv(count, block_h))](
        *(q_BSHX, kv_BTHY, k_rope_NR, cos, sin, rotated_BSHX, k_BTHX, v_BTHZ),
        *(batch * length, batch * keys, cos.shape[:-1].numel(), k_rope_NR.stride(0)),
        *(count, nope, rotated // 2, value),
        PADS=pads,
        BLOCK_H=block_h,
        BLOCK_P=block_p,
        BLOCK_J=triton.next_power_of_2(max(rotated // 2, 1)),
        BLOCK_Z=triton.next_power_of_2(width),
    )
    return rotated_BSHX, k_BTHX, v_BTHZ


@triton.jit
def _heads(
    q,
    kv,
    k_rope,
    cosines,
    sines,
    q_out,
    k_out,
    v_out,
    queries,
    keys,
    angles,
    k_rope_n,
    heads,
    nope,
    pairs,
    value,
    PADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Query n and key n, a block of heads of both; queries of several rows may share their angles."""
    n = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    p_P, j_J = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_J)
    width = nope + 2 * pairs
    ok_HP = (h_H < heads)[:, None] & (p_P < nope)[None, :]
    ok_HJ = (h_H < heads)[:, None] & (j_J < pairs)[None, :]
    to_H1 = ((n * heads + h_H) * width)[:, None]
    if n < queries:
        from_HJ = q + to_H1 + nope + 2 * j_J[None, :]
        even_HJ = tl.load(from_HJ, mask=ok_HJ, other=0.0).to(tl.float32)
        odd_HJ = tl.load(from_HJ + 1, mask=ok_HJ, other=0.0).to(tl.float32)
        at_J = n % angles * pairs + j_J
        cos_1J = tl.load(cosines + at_J, mask=j_J < pairs, other=0.0)[None, :]
        sin_1J = tl.load(sines + at_J, mask=j_J < pairs, other=0.0)[None, :]
        first_HJ, second_HJ = rotated(even_HJ, odd_HJ, cos_1J, sin_1J, q_out.dtype.element_ty)
        to_HJ = q_out + to_H1 + nope + j_J[None, :]
        tl.store(to_HJ, first_HJ, mask=ok_HJ)
        tl.store(to_HJ + pairs, second_HJ, mask=ok_HJ)
        tl.store(q_out + to_H1 + p_P[None, :], tl.load(q + to_H1 + p_P[None, :], mask=ok_HP), mask=ok_HP)
    if n < keys:
        from_H1 = ((n * heads + h_H) * (nope + value))[:, None]
        tl.store(k_out + to_H1 + p_P[None, :], tl.load(kv + from_H1 + p_P[None, :], mask=ok_HP), mask=ok_HP)
        shared_J = k_rope + n * k_rope_n + j_J
        to_HJ = k_out + to_H1 + nope + j_J[None, :]
        for half in tl.static_range(2):
            half_1J = tl.load(shared_J + half * pairs, mask=j_J < pairs, other=0.0)[None, :]
            tl.store(to_HJ + half * pairs, tl.broadcast_to(half_1J, (BLOCK_H, BLOCK_J)), mask=ok_HJ)
        if PADS:
            z_1Z = tl.arange(0, BLOCK_Z)[None, :]
            value_HZ = tl.load(kv + from_H1 + nope + z_1Z, mask=(h_H < heads)[:, None] & (z_1Z < value), other=0.0)
            tl.store(v_out + to_H1 + z_1Z, value_HZ, mask=(h_H < heads)[:, None] & (z_1Z < width))
