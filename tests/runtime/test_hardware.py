"""The allocator's setting: memory is reserved and not taken, kept when freed, and lies in huge pages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.config import ConfigError
from fathom.runtime.hardware import usable_device

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import json, resource, torch
from fathom.runtime.hardware import KEEP as install_allocator

def status(key, path="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(key))  # KiB

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = status("VmRSS")
install_allocator()
install_allocator()
reserved = status("VmRSS") - before
torch.ones(20_000_000)
start = faults()
for _ in range(5):
    held = torch.ones(20_000_000)
    huge = status("AnonHugePages", "/proc/self/smaps_rollup")
    del held
print(json.dumps({"reserved": reserved, "faults": faults() - start, "huge": huge}))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("way", ["install_allocator", "_keep_heap"])
def test_freed_memory_is_kept(way: str) -> None:
    """With a compiler, and without one."""
    program = PROGRAM.replace("KEEP", way)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert found["reserved"] < 50_000
    # 80 MB are 20,000 pages; taken again five times they may not be mapped again.
    assert found["faults"] < 2_000
    if "[never]" not in _HUGE.read_text():
        assert found["huge"] > 60_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the arena needs Linux")
def test_without_address_space_glibcs_heap_is_tuned_and_the_reason_returned() -> None:
    program = (
        "import os, resource, torch\n"
        "memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (memory, memory))\n"
        "from fathom.runtime.hardware import install_allocator\n"
        "print(install_allocator())\n"
        "print(float(torch.ones(1 << 20).sum()))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ulimit -v" in result.stdout and str(float(1 << 20)) in result.stdout


def test_a_device_that_cannot_be_used_is_one_sentence() -> None:
    assert usable_device("cpu").type == "cpu"
    for name in ("toaster", "cuda:99", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError, match=f"the device is '{name}'; it must be a torch device of this machine"):
            usable_device(name)
