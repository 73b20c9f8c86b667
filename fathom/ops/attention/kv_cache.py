"""What the KV cache holds of a token: its normalised latent, and the rotated key that all heads share.

Shapes: B batch, S length, N tokens, C latent width, R rope width, W = C+R, M slots of the cache.
"""

import torch
from torch import Tensor

from fathom.ops import gpu
from fathom.ops.norm import rms_norm
from fathom.ops.rope import Rope, apply_rope


def latents(kv_BSW: Tensor, norm_C: Tensor, eps: float, rope: Rope) -> tuple[Tensor, Tensor]:
    """The first C elements normalised (B, S, C), the others rotated (B, S, R)."""
    latent = norm_C.shape[0]
    return rms_norm(kv_BSW[..., :latent], norm_C, eps), apply_rope(kv_BSW[..., latent:], rope)


def write_kv_cache_reference(
    kv_NW: Tensor, norm_C: Tensor, eps: float, rope: Rope, slot_mapping_N: Tensor, cache_MW: Tensor
) -> None:
    """Write each token's W elements to its slot; `rope` has a row for every token."""
    latents_NW = torch.cat(latents(kv_NW[None], norm_C, eps, rope), dim=-1)[0]
    cache_MW[slot_mapping_N] = latents_NW.to(cache_MW.dtype)


def write_kv_cache(
    kv_NW: Tensor, norm_C: Tensor, eps: float, rope: Rope, slot_mapping_N: Tensor, cache_MW: Tensor
) -> None:
    """As the reference; on a GPU in one kernel."""
    if gpu.usable(kv_NW, norm_C, cache_MW):
        from fathom.ops.attention.triton import write_kv_cache  # Triton comes with torch's CUDA builds alone

        write_kv_cache(kv_NW, norm_C, eps, rope, None, slot_mapping_N, cache_MW)
    else:
        write_kv_cache_reference(kv_NW, norm_C, eps, rope, slot_mapping_N, cache_MW)
