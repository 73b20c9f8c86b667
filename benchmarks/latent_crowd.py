"""Attention over many sequences' latents at once: what a GPU's decoding step does in every layer, by itself.

Shapes: N sequences of T tokens, H heads, C = 512 latent and R = 64 rope numbers, as in DeepSeek-V3.
"""

from itertools import cycle

import torch
from triton.testing import do_bench

from fathom.ops.attention.triton import Places, Scratch, paged_latent_attention
from fathom.ops.rope import Rope

_LATENT, _ROPE, _PAGE = 512, 64, 64
_LEAST_BYTES = 256 << 20
"""Copies of the cache take turns until together they are several times as large as a GPU's own cache."""


class LatentCrowd:
    """Random latents in scattered pages, and a query of every sequence."""

    def __init__(self, heads: int, sequences: int, length: int, device: torch.device) -> None:
        width, pages = _LATENT + _ROPE, length // _PAGE
        self.bytes = 2 * sequences * length * width
        self.flops = 2 * sequences * length * heads * (width + _LATENT)
        copies = 1 + _LEAST_BYTES // self.bytes
        slots = sequences * length
        self._caches = cycle([torch.randn(slots, width, device=device).bfloat16() for _ in range(copies)])
        self._q_NHC = torch.randn(sequences, heads, _LATENT, device=device).bfloat16()
        self._q_NHR = torch.randn(sequences, heads, _ROPE, device=device).bfloat16()
        self._out_NHC = torch.empty_like(self._q_NHC)
        angles = torch.rand(length, _ROPE // 2, device=device)
        self._rope = Rope(angles.cos(), angles.sin())
        rows = torch.arange(sequences, device=device)
        table = torch.randperm(sequences * pages, device=device)
        numbers = torch.cat((torch.tensor([pages], device=device), table))
        self._places = Places(torch.full_like(rows, length - 1), rows, rows, numbers, _PAGE)
        self._scratch = Scratch.of(sequences, heads, _LATENT, device)

    def attend(self) -> None:
        q = (self._q_NHC, self._q_NHR, self._rope, self._places, next(self._caches))
        paged_latent_attention(*q, 0.07, self._scratch, self._out_NHC)

    def seconds(self) -> float:
        """Median time of one call."""
        return do_bench(self.attend, warmup=25, rep=200, return_mode="median") / 1e3
