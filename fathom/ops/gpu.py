"""When the operations use Triton kernels: on a GPU, where plain torch would need many launches or much memory traffic.

Triton comes with torch's CUDA builds alone, so the kernels' modules (`triton*.py`) are imported only where one runs.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_INSTALLED = find_spec("triton") is not None
"""Whether Triton is installed. (A constant: torch.compile traces the functions that branch on it.)"""

_BLOCK = 1024
"""Columns that a program of `row_grid` takes at most."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)


def usable(*tensors: Tensor) -> bool:
    """Whether the inference kernels take these tensors: plain tensors on a GPU, none of which needs a gradient.

    False under torch.compile, which generates kernels of its own.
    """
    if torch.compiler.is_compiling() or not TRITON_INSTALLED:
        return False
    # Subclasses (fake, functional, distributed tensors) have no memory of their own to point at.
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda and t.dtype in _TYPES for t in tensors)
    return plain and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def row_grid(out: Tensor) -> tuple[tuple[int, int], int]:
    """Grid and block size of a kernel that takes a block of one row's columns per program; `out`: (rows, columns)."""
    rows, columns = out.shape
    block = min(_BLOCK, 1 << (columns - 1).bit_length())  # a power of two, as Triton's ranges are
    return (rows, -(-columns // block)), block
