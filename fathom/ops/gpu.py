"""The fast operations' Triton: what a GPU runs where plain torch would be many launches or many bytes.

Triton comes with torch's CUDA builds, and only modules that are about to use it import from the files in here.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
"""Whether there is a Triton. (A constant: torch.compile traces those who ask.)"""

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels without gradients take these tensors: plain ones on a GPU, of which nobody wants a gradient.

    torch.compile makes kernels of its own.
    """
    if torch.compiler.is_compiling() or not INSTALLED:
        return False
    # Subclasses (fake, functional, distributed tensors) have no memory of their own to point at.
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda and t.dtype in _TYPES for t in tensors)
    return plain and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
