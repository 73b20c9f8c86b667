"""Compile arena.cpp against the installed torch and make it the allocator of tensors on the CPU."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fathom.runtime.cpp import library_of, torch_folder


class ArenaStats(NamedTuple):
    """Bytes."""

    in_use: int
    """Of tensors in the arena."""
    reached: int
    """What it ever held at once, holes included: what of it the machine may have had to give."""


def install(size: int) -> str | None:
    """Let tensors made from now on live in an arena; once per process. Older ones stay where they are.

    `size`: bytes of address space for small and for large tensors each; what is beyond goes to glibc. Returns why
    nothing was changed, in words (another system than Linux, no C++ compiler, no such room), or None.
    """
    library = _library()
    if isinstance(library, str):
        return library
    refused = library.arena_install(ctypes.c_size_t(size))
    return f"the system does not reserve twice {size:,} bytes of address space (ulimit -v)" if refused else None


def arena_stats() -> ArenaStats:
    """How much of the arena is used. Only after `install`."""
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    in_use, reached = ctypes.c_size_t(), ctypes.c_size_t()
    library.arena_stats(ctypes.byref(in_use), ctypes.byref(reached))
    return ArenaStats(in_use.value, reached.value)


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not sys.platform.startswith("linux"):
        return "the arena knows Linux alone"
    folder = torch_folder() / "lib"
    links = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lc10"]
    return library_of("arena", [Path(__file__).parent / "arena.cpp"], links=links, with_torch=torch.__version__)
