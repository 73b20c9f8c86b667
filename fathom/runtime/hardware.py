"""What this machine can do: a short timing of its matrix products, its memory, its compiler, its allocator."""

import ctypes
import os
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median

import torch

from fathom.runtime.arena.install import install

_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a large square product: the peak that MFU is a fraction of."""
    [times] = _product_times([dtype], device)
    return 2 * _side(device) ** 3 / median(times)


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32: CPUs without AVX512-BF16 or AMX do not."""
    # In turn, and the best of each: another program that takes the processor for a while must not decide.
    narrow, wide = map(min, _product_times([torch.bfloat16, torch.float32], device))
    return torch.bfloat16 if 1.2 * narrow < wide else torch.float32


def _side(device: torch.device) -> int:
    """Of the square product."""
    return _SIZE.get(device.type, 1024)


def _product_times(dtypes: list[torch.dtype], device: torch.device) -> list[list[float]]:
    """Seconds of a large square product in each of the types, in turn, after one that warms up."""
    size = _side(device)
    factors = [[torch.randn(size, size, device=device).to(dtype) for _ in range(2)] for dtype in dtypes]
    times: list[list[float]] = [[] for _ in dtypes]
    for repeat in range(_REPEATS + 1):
        for (a, b), found in zip(factors, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            a @ b
            _synchronize(device)
            if repeat:
                found.append(time.perf_counter() - start)
    return times


def free_memory(device: torch.device) -> int:
    """Bytes that a run may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile lacks here, in words; None when nothing."""
    if device.type != "cpu":
        return None
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name):
        return "no C++ compiler (Debian: apt install g++; macOS: xcode-select --install)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (Debian: apt install python3-dev)"
    return None


def keep_freed_memory() -> str | None:
    """Keep what is freed for what is taken next instead of giving it back to the kernel, and keep it in huge pages.

    A training step, or the reading of a prompt, frees and takes the same large buffers again; with glibc's defaults
    each is mapped and zeroed by the kernel anew, hundreds of thousands of page faults a step, and read through small
    pages (docs/log/memory.md). Tensors made from now on live in an arena (fathom/runtime/arena), almost without
    fragmentation; where there can be none, glibc is set to keep freed memory, and the reason is returned. Memory is
    only reserved here, not taken. Elsewhere than on Linux: nothing.
    """
    if not sys.platform.startswith("linux"):
        return None
    why = install(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if why:
        _keep_heap()
    return why


def _keep_heap() -> None:
    """Have glibc's own heap keep what is freed. With another C library: nothing."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_TOP_PAD, 64 << 20)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = free_memory(torch.device("cpu")) * 3 // 4
    block = libc.malloc(size)  # the heap grows by so much, untouched
    if block:
        start = (block + _HUGE_PAGE - 1) // _HUGE_PAGE * _HUGE_PAGE
        # A kernel without huge pages refuses, which changes nothing.
        libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
