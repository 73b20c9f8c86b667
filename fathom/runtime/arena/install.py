"""Compile arena.cpp against the installed torch and make it the allocator of tensors on the CPU."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fathom.runtime.cpp import load_library, torch_folder


class ArenaStats(NamedTuple):
    """Bytes."""

    in_use: int
    """Of tensors in the arena."""
    peak: int
    """The most it ever spanned, holes included: an upper bound of the memory the system had to provide."""


def install_arena(size: int) -> str | None:
    """Allocate tensors in an arena from now on; once per process. Older ones stay where they are.

    `size`: bytes of address space for small and for large tensors each; what does not fit goes to glibc. Returns None
    or, where nothing was changed, the reason: another system than Linux, no C++ compiler, too little address space.
    """
    library = _library()
    if isinstance(library, str):
        return library
    refused = library.arena_install(ctypes.c_size_t(size))
    return f"the system does not reserve twice {size:,} bytes of address space (ulimit -v)" if refused else None


def arena_stats() -> ArenaStats:
    """How much of the arena is used. Only after `install_arena`."""
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    in_use, peak = ctypes.c_size_t(), ctypes.c_size_t()
    library.arena_stats(ctypes.byref(in_use), ctypes.byref(peak))
    return ArenaStats(in_use.value, peak.value)


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not sys.platform.startswith("linux"):
        return "the arena needs Linux"
    folder = torch_folder() / "lib"
    links = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10"]
    return load_library("arena", [Path(__file__).parent / "arena.cpp"], links=links, with_torch=torch.__version__)
