"""Where the GPU's kernels are tested: on a GPU, or else in Triton's interpreter (conftest.py at the root)."""

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRODUCT_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="no GPU"))]
"""Types of matrices that are multiplied: the interpreter multiplies bfloat16 wrongly."""
