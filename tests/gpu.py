"""Where the GPU's kernels are tested: on a GPU, or else in Triton's interpreter (conftest.py at the root)."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRODUCT_DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not ON_GPU, reason="no GPU"))]
"""Types of matrices that are multiplied: the interpreter multiplies bfloat16 wrongly."""


def _hasten_interpreter() -> None:
    """The interpreter without two things that take more than half of its time.

    It patches `triton.language` anew for every call of a device function, although the kernel that calls it has done
    so; and it computes integers a second time in 64 bits, in search of overflows, which no compiled kernel does.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if tl.core.is_builtin(tl.core.arange):
            # The modules of Triton's own device functions, such as tl.zeros: patched once, and never restored.
            interpreter._patch_lang(tl.zeros.fn)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if not ON_GPU and find_spec("triton") is not None:
    _hasten_interpreter()
