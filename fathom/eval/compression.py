"""What general-purpose compressors make of the same text: the yardstick beside a model's bits per byte.

A model that spends b bits per byte would, driving an arithmetic coder, compress the text to b/8 of its size.
gzip sees 32 KiB back, xz as far as its 64 MiB dictionary: a model must beat both to have learnt anything
about language.
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
