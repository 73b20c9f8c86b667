"""Compile C++ once per machine and load it.

Needs only a C++ compiler with OpenMP (g++ or clang++). A library is kept in the user's cache under a hash of everything
it was made from.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

NO_COMPILER = "no C++ compiler (Debian: apt install g++; macOS: xcode-select --install)"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def load_library(
    name: str,
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
    include: Path | None = None,
    links: Sequence[str] = (),
    with_torch: str = "",
) -> ctypes.CDLL | str:
    """Compile `sources` into a shared library and load it, from the cache if possible; or the reason why that failed.

    `include`: the folder that `#include "…"` starts from. `links`: the linker's arguments. `with_torch`: torch's
    version where its headers are used, else empty.
    """
    compiler = find_compiler()
    if compiler is None:
        return NO_COMPILER
    texts = [path.read_text() for path in (*sources, *headers)]
    made_from = [*texts, *_FLAGS, *links, with_torch, _version(compiler), platform.machine(), _processor()]
    digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()[:16]
    path = _cache() / f"{name}-{digest}.so"
    includes = [f"-I{torch_folder() / 'include'}"] if with_torch else []
    includes += [f"-I{include}"] if include is not None else []
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


def _compile(compiler: str, sources: Sequence[Path], includes: Sequence[str], links: Sequence[str], path: Path) -> None:
    """Compile under a temporary name first: a process that starts meanwhile must not load a half-written library."""
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


def find_compiler() -> str | None:
    """The C++ compiler that is used: $CXX, or the first there is."""
    candidates = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def _processor() -> str:
    """What -march=native depends on; several kinds of machines may share a home directory."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fathom")
