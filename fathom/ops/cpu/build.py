"""Compile the C++ beside this file once per machine, load it, and call it with tensors.

Needs only a C++ compiler that knows OpenMP (g++ or clang++); where there is none `available()` is False and the callers
use plain torch. The library is kept in the user's cache under a hash of everything it was made from.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

# Parameters of each function after the number of threads: p pointer, n integer, f floating point.
_PARAMETERS = {
    "rms_norm": "pnpppnnf",
    "rms_norm_backward": "pnpppppnn",
    "swiglu": "pppnn",
    "swiglu_backward": "pppppnn",
    "attention": "pppppppnnnnnnnnnf",
    "attention_backward": "pppppppppppnnnnnnnnf",
    "routed_experts": "ppppppppnnnn",
    "routed_experts_backward": "ppppppppppppnnnn",
    "sum_rows": "pppnnn",
    "linear": "pppnnn",
    "linear_input_gradient": "pppnnn",
    "linear_weight_gradient": "pppnnnn",
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


def own_products(dtype: torch.dtype) -> bool:
    """Whether kernels multiply matrices of this type, and do it themselves (gemm.h) rather than ask torch."""
    used = _enabled and not torch.compiler.is_compiling()
    return used and dtype == torch.bfloat16 and available() and bool(_loaded().own_products())


def missing() -> str | None:
    """Why the kernels cannot be built here, in words; None where they can."""
    library = _library()
    return library if isinstance(library, str) else None


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Run the kernel on tensors that are contiguous, unless it takes a stride."""
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _function(name, dtype)(torch.get_num_threads(), *pointers)
    failures = _loaded().failures()
    if failures:
        raise RuntimeError(f"{failures} of torch's matrix products failed inside {name} ({dtype})")


@contextmanager
def disabled() -> Iterator[None]:
    """Plain torch for everything in the block: what the kernels are tested and measured against."""
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
    library = library_of("kernels", _SOURCES, _HEADERS)
    if isinstance(library, ctypes.CDLL):
        try:
            _give_torch(library)
        except (OSError, AttributeError) as error:
            return f"the kernels cannot be built: {error}"
    return library


def library_of(
    name: str, sources: Sequence[Path], headers: Sequence[Path] = (), links: Sequence[str] = (), with_torch: str = ""
) -> ctypes.CDLL | str:
    """What `sources` compile to, from the cache where they did before; or why they do not, in words.

    `links`: the linker's arguments. `with_torch`: torch's version, where its headers are used.
    """
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler (Debian: apt install g++; macOS: xcode-select --install)"
    texts = [path.read_text() for path in (*sources, *headers)]
    made_from = [*texts, *_FLAGS, *links, with_torch, _version(compiler), platform.machine(), _processor()]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    path = _cache() / f"{name}-{digest}.so"
    includes = [f"-I{torch_folder() / 'include'}"] if with_torch else []
    try:
        if not path.exists():
            _compile(compiler, sources, includes, links, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines() or [f"exit status {error.returncode}"]
        return f"{compiler} does not build the {name}: {reason[0]}"
    except OSError as error:
        return f"the {name} cannot be built: {error}"


def torch_folder() -> Path:
    """Where torch's headers and libraries are."""
    return Path(torch.__file__).parent


def _give_torch(library: ctypes.CDLL) -> None:
    """Hand over the functions of torch that products.h declares."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    own = ctypes.CDLL(str(torch_folder() / "lib" / f"libtorch_cpu.{suffix}"))
    names = ("aoti_torch_create_tensor_from_blob", "aoti_torch_delete_tensor_object", "aoti_torch_cpu_mm_out")
    addresses = [ctypes.cast(getattr(own, name), ctypes.c_void_p) for name in names]
    library.use_torch(*addresses, own.aoti_torch_dtype_float32(), own.aoti_torch_dtype_bfloat16())


def _compile(compiler: str, sources: Sequence[Path], includes: Sequence[str], links: Sequence[str], path: Path) -> None:
    """Under another name first: processes that start together must not load a half-written library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch, f"{source.stem}.o") for source in sources]

        def run(*arguments: str | Path) -> None:
            subprocess.run([compiler, *_FLAGS, *map(str, arguments)], check=True, capture_output=True, text=True)

        with ThreadPoolExecutor(os.cpu_count()) as several:
            list(several.map(lambda source, made: run(*includes, "-c", source, "-o", made), sources, objects))
        made = Path(scratch, path.name)
        run(*objects, *links, "-o", made)
        made.replace(path)


def _compiler() -> str | None:
    wanted = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in wanted if name and (found := shutil.which(name))), None)


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on: a shared home directory serves machines of several kinds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fathom")
