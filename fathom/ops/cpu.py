"""The operations' C++, compiled into one library on first use and called with tensors.

Where there is no C++ compiler `available()` is False and the callers use plain torch.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fathom.runtime.cpp import load_library, torch_folder

_FOLDER = Path(__file__).parent
_SOURCES = sorted(_FOLDER.rglob("*.cpp"))
_HEADERS = sorted(_FOLDER.rglob("*.h"))
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Parameters of each function after the thread count: p pointer, n integer, f floating point.
_PARAMETERS = {
    "rms_norm": "pnpppnnf",
    "rms_norm_backward": "pnpppppnn",
    "swiglu": "pppnn",
    "swiglu_backward": "pppppnn",
    "attention": "ppppppppnnnnnnnnnf",
    "attention_backward": "ppppppppppppnnnnnnnnf",
    "routed_experts": "ppppppppnnnn",
    "routed_experts_backward": "ppppppppppppnnnn",
    "combine": "pppnnn",
    "linear": "pppnnn",
    "linear_dgrad": "pppnnn",
    "linear_wgrad": "pppnnnn",
    "select_experts": "ppnnnnn",
    "cross_entropy": "pppnnn",
    "decode": "ppn",
}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_double}

_enabled = True


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: plain ones on the CPU, float32 or bfloat16, outside torch.compile."""
    if not _enabled or torch.compiler.is_compiling():
        return False
    # Subclasses (fake, functional, distributed tensors) have no memory of their own to point at.
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors)
    return plain and tensors[0].dtype in _SUFFIX and available()


def available() -> bool:
    """Whether the kernels are, or can be, built here."""
    return isinstance(_library(), ctypes.CDLL)


def has_bf16_gemm(dtype: torch.dtype) -> bool:
    """Whether matmuls of this type inside the kernels are our own (gemm.h) and not torch's."""
    used = _enabled and not torch.compiler.is_compiling()
    return used and dtype == torch.bfloat16 and available() and bool(_loaded().has_bf16_gemm())


def missing() -> str | None:
    """The reason why the kernels cannot be built here; None where they can."""
    library = _library()
    return library if isinstance(library, str) else None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run kernel `name` for a type; tensors must be contiguous unless the kernel takes their stride, None is null.

    Raises RuntimeError if one of torch's matmuls failed inside the kernel.
    """
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _function(name, dtype)(torch.get_num_threads(), *pointers)
    failures = _loaded().failures()
    if failures:
        raise RuntimeError(f"{failures} of torch's matmuls failed inside {name} ({dtype})")


@contextmanager
def disabled() -> Iterator[None]:
    """Use plain torch within the block: what the kernels are tested and benchmarked against."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


@cache
def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    prototype = ctypes.CFUNCTYPE(None, ctypes.c_int, *(_TYPES[kind] for kind in _PARAMETERS[name]))
    address = ctypes.c_void_p.in_dll(_loaded(), f"{name}_{_SUFFIX[dtype]}").value
    assert address is not None
    return prototype(address)


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    return library


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    library = load_library("kernels", _SOURCES, _HEADERS, include=_FOLDER)
    if isinstance(library, ctypes.CDLL):
        try:
            _register_torch(library)
        except (OSError, AttributeError) as error:
            return f"the kernels cannot be built: {error}"
    return library


def _register_torch(library: ctypes.CDLL) -> None:
    """Pass the library the functions of torch that linear/matmul.h declares."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    own = ctypes.CDLL(str(torch_folder() / "lib" / f"libtorch_cpu.{suffix}"))
    names = ("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "aoti_torch_cpu_mm_out")
    addresses = [ctypes.cast(getattr(own, name), ctypes.c_void_p) for name in names]
    library.use_torch(*addresses, own.aoti_torch_dtype_float32(), own.aoti_torch_dtype_bfloat16())
