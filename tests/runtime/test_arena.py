"""The allocator of tensors: nothing overlaps, nothing is lost, holes close. Each test is a process of its own."""

import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the arena needs Linux")

BEGIN = """
import json, os, random, threading
import torch
from fathom.runtime.arena.install import arena_stats, install_arena
"""

CHURN = """
assert not install_arena(1 << 34)
faults = []

def churn(rounds, seed):
    rng, held = random.Random(seed), []
    for _ in range(rounds):
        size = int(2 ** rng.uniform(0, 22))
        value = rng.randrange(1 << 30)
        tensor = torch.full((size,), value, dtype=torch.int32)
        if tensor.data_ptr() % 64:
            faults.append(f"{size} elements at {tensor.data_ptr()}")
        held.append((tensor, value))
        while len(held) > 40 or held and rng.random() < 0.4:
            tensor, value = held.pop(rng.randrange(len(held)))
            if not bool((tensor == value).all()):
                faults.append(f"{len(tensor)} elements have changed")
    return held

threads = [threading.Thread(target=churn, args=(300, SEED + each)) for each in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
held = churn(300, SEED)
spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in held)
overlap = any(end > begin for (_, end), (begin, _) in zip(spans, spans[1:]))
in_use = arena_stats().in_use
live = sum(t.nbytes for t, _ in held if t.nbytes >= 1024)
del held
before = arena_stats().peak
whole = torch.empty(before, dtype=torch.int8)  # all that was freed has merged again: this does not raise the peak
print(json.dumps(dict(
    faults=faults[:3], overlap=overlap, in_use=in_use, live=live, whole=whole.nbytes,
    left=arena_stats().in_use, before=before, peak=arena_stats().peak,
)))
"""

STEPS = """
assert not install_arena(1 << 34)
mebibyte = 1 << 20

def tensor(size):
    return torch.empty(size, dtype=torch.int8)

weights = [tensor(3 * mebibyte) for _ in range(8)]
most = 0
for step in range(4):
    kept = [[tensor(2 * mebibyte), tensor(5 * mebibyte), tensor(mebibyte // 2)] for _ in range(8)]
    gradients = []
    for layer in range(8):
        passing = tensor(4 * mebibyte)
        most = max(most, arena_stats().in_use)
        gradients.append(tensor(6 * mebibyte))
        kept.pop()
        del passing
    del gradients
print(json.dumps(dict(most=most, peak=arena_stats().peak)))
"""

FULL = """
assert not install_arena(8 << 20)
small = [torch.ones(1 << 16) for _ in range(64)]  # twice what the region of small ones holds
large = torch.ones(1 << 24)
inside = arena_stats().in_use
total = sum(float(each.sum()) for each in small) + float(large.sum())
del small, large
print(json.dumps(dict(total=total, inside=inside, left=arena_stats().in_use)))
"""

CHILD = """
assert not install_arena(1 << 34)
stop = threading.Event()
def busy():
    while not stop.is_set():
        torch.empty(1 << 20)
thread = threading.Thread(target=busy)
thread.start()
codes = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(int(torch.arange(100_000).sum() != 4_999_950_000))
    codes.append(os.waitpid(child, 0)[1])
stop.set()
thread.join()
print(json.dumps(dict(codes=codes)))
"""


def found(program: str) -> Any:
    result = subprocess.run([sys.executable, "-c", BEGIN + program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("seed", [1, 2])
def test_tensors_keep_their_values_and_do_not_overlap(seed: int) -> None:
    seen = found(CHURN.replace("SEED", str(seed)))
    assert not seen["faults"] and not seen["overlap"]
    # Blocks are rounded up to 64 bytes; tiny ones are not here at all.
    assert seen["live"] <= seen["in_use"] < seen["live"] + 64 * 100
    assert seen["left"] == (seen["whole"] + 63) // 64 * 64
    # Large tensors alone fit where large and small ones were; at worst the small ones' share is added.
    assert seen["peak"] <= seen["before"] + 40 * 4 * (256 << 10)


def test_a_training_step_leaves_almost_no_fragmentation() -> None:
    """Activations grow upwards, gradients replace them from the top; the next step finds the space unsplit again."""
    seen = found(STEPS)
    assert seen["most"] <= seen["peak"] < 1.1 * seen["most"]


def test_beyond_the_arena_tensors_are_glibcs() -> None:
    seen = found(FULL)
    assert seen["total"] == 64 * (1 << 16) + (1 << 24)
    assert 0 < seen["inside"] <= 16 << 20 and seen["left"] == 0


def test_a_forked_child_allocates() -> None:
    """Not even where another thread was allocating at that moment."""
    assert found(CHILD)["codes"] == [0] * 20


def test_installing_twice_or_too_much() -> None:
    refused, first, again = found(
        "print(json.dumps([install_arena(1 << 60), install_arena(1 << 30), install_arena(1 << 30)]))"
    )
    assert "does not reserve" in refused and first is None and again is None


def test_the_profiler_still_sees_memory() -> None:
    seen = found(
        "from torch.profiler import profile, ProfilerActivity\n"
        "assert not install_arena(1 << 34)\n"
        "with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:\n"
        "    held = torch.empty(1 << 22)\n"
        "print(json.dumps(max(event.self_cpu_memory_usage for event in trace.key_averages())))"
    )
    assert seen == 4 << 22


def test_out_of_memory_raises_as_without_the_arena() -> None:
    seen = found(
        "assert not install_arena(1 << 30)\n"
        "try:\n"
        "    torch.empty(1 << 60, dtype=torch.int8)\n"
        "except RuntimeError as error:\n"
        "    print(json.dumps(str(error)))"
    )
    assert "can't allocate memory" in seen and str(1 << 60) in seen
