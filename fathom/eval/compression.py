"""Bits per byte of general-purpose compressors on the same text, to compare a model's with.

A model that spends b bits per byte would, driving an arithmetic coder, compress the text to b/8 of its size.
gzip looks back 32 KiB, xz as far as its 64 MiB dictionary: a model that has learnt anything about
language beats both.
"""

import gzip
import lzma
from dataclasses import dataclass


@dataclass(frozen=True)
class CompressedSize:
    """Bits per byte of the original."""

    gzip: float
    """As `gzip -9`."""
    xz: float
    """As `xz -9`."""


def compressed_bits_per_byte(data: bytes) -> CompressedSize:
    """Compress `data`, the held-out text in UTF-8, with gzip and xz at their highest levels.

    Raises ValueError for empty data.
    """
    if not data:
        raise ValueError("data is empty; there is nothing to compress")
    packed = gzip.compress(data, compresslevel=9, mtime=0), lzma.compress(data, preset=9)
    gzip_bits, xz_bits = (8 * len(one) / len(data) for one in packed)
    return CompressedSize(gzip=gzip_bits, xz=xz_bits)
