"""Before any test is loaded: Triton's kernels run in its interpreter where there is no GPU.

Triton decides that when it is imported, which tests/conftest.py brings about.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
