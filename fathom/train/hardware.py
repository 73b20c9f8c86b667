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

_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 5

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Measured FLOP/s of a large square product: the peak that MFU is a fraction of."""
    size = _SIZE.get(device.type, 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        a @ b
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times[1:])


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the machine multiplies it faster than float32: CPUs without AVX512-BF16 or AMX do not."""
    narrow, wide = matmul_flops(torch.bfloat16, device), matmul_flops(torch.float32, device)
    return torch.bfloat16 if narrow > 1.2 * wide else torch.float32


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


def keep_freed_memory() -> None:
    """Have glibc keep what is freed instead of giving it back to the kernel, and keep it in huge pages.

    A training step, or the reading of a prompt, frees and takes the same large buffers again; with glibc's defaults
    each is mapped and zeroed by the kernel anew, hundreds of thousands of page faults a step, and read through small
    pages (docs/log.md). Memory is only reserved here, not taken. Elsewhere than on glibc: nothing.
    """
    if not sys.platform.startswith("linux"):
        return
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
