"""What this machine can do: the speed of its matmuls, its memory, its compiler, its allocator."""

import ctypes
import os
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median

import torch

from fathom.config import ConfigError
from fathom.runtime.arena.install import install_arena
from fathom.runtime.cpp import NO_COMPILER, find_compiler

_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are timed."""
_REPEATS = 5

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a large square matmul: the peak that MFU is a fraction of."""
    [times] = _matmul_times([dtype], device)
    return 2 * _SIZE[device.type] ** 3 / median(times)


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where its matmuls are faster than float32's, else float32: CPUs without AVX512-BF16 or AMX."""
    # Alternating, and the best of each, so that another program's burst of load does not decide.
    bf16, fp32 = map(min, _matmul_times([torch.bfloat16, torch.float32], device))
    return torch.bfloat16 if 1.2 * bf16 < fp32 else torch.float32


def _matmul_times(dtypes: list[torch.dtype], device: torch.device) -> list[list[float]]:
    """Seconds of a large square matmul in each of the types, alternating, after one to warm up."""
    size = _SIZE[device.type]
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


def usable_device(name: str) -> torch.device:
    """The torch device of that name. Raises ConfigError where there is none that can be used here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        expected = "a torch device of this machine, such as cpu, cuda or cuda:1"
        raise ConfigError(f"the device is {name!r}; it must be {expected} ({reason})") from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return total_memory(device)


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, used or free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compile_unavailable_reason(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on the device; None where it can."""
    if device.type != "cpu":
        return None
    if find_compiler() is None:
        return NO_COMPILER
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (Debian: apt install python3-dev)"
    return None


def install_allocator() -> str | None:
    """Install an allocator that keeps freed memory for the next tensors, in huge pages, instead of unmapping it.

    Every training step, and every prefill, frees and allocates the same large buffers; with glibc's defaults the
    kernel maps and zeroes each of them anew, hundreds of thousands of page faults a step, in small pages
    (docs/log/memory.md). From now on tensors are allocated in an arena (fathom/runtime/arena), almost without
    fragmentation; where that is impossible, glibc's heap is tuned to keep freed memory and the reason is returned.
    This reserves address space and allocates nothing. On systems other than Linux it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return None
    why = install_arena(total_memory(torch.device("cpu")))
    if why:
        _keep_heap()
    return why


def _keep_heap() -> None:
    """Tune glibc's own heap to keep freed memory. Does nothing with another C library."""
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
    block = libc.malloc(size)  # grows the heap by this size without touching it
    if block:
        start = (block + _HUGE_PAGE - 1) // _HUGE_PAGE * _HUGE_PAGE
        # A kernel without huge pages refuses, which changes nothing.
        libc.madvise(start, (block + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(block)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
