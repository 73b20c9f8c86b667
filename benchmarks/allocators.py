"""Memory and speed of training on a CPU with one allocator or another: `python benchmarks/allocators.py`.

The arena of fathom/runtime/arena against glibc's malloc and whichever of jemalloc, mimalloc and tcmalloc are installed
(Debian: libjemalloc2, libmimalloc2.0, libtcmalloc-minimal4), which are loaded with LD_PRELOAD. Sides are those of
benchmarks/train.py and take their steps in turn.
"""

import argparse
import ctypes.util
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.table import Table
from rotation import WARM_UP, Group, Result, measure
from side import HAS_PEAK_MEMORY, Spec, cpu_model

from fathom.presets import bench_small

_PRELOADED = ("jemalloc", "mimalloc", "tcmalloc_minimal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="counted steps of each side (default: 7)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default: 4)")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence (default: 512)")
    arguments = parser.parse_args()
    if not HAS_PEAK_MEMORY:
        parser.error("this system does not report a process's peak memory")
    console = Console()
    shape = bench_small().model
    libraries = {name: ctypes.util.find_library(name) for name in _PRELOADED}
    for name in (name for name, library in libraries.items() if library is None):
        console.print(f"{name} is not installed: left out")
    environments = {name: {"LD_PRELOAD": library} for name, library in libraries.items() if library}
    tuned = Spec("fathom", shape, arguments.batch, arguments.length)
    group = Group({"arena": tuned} | {name: replace(tuned, allocator="default") for name in ("glibc", *environments)})
    with console.status("") as status:
        outcome = measure(group, arguments.turns, status.update, environments)
    title = f"bench-small, {tuned.batch} x {tuned.length} tokens, bfloat16, AdamW; {cpu_model()}"
    console.print(_table(title, outcome.sides))
    console.print(
        f"Medians of {arguments.turns} steps after {WARM_UP}; memory: the peak above weights, gradients, moments."
    )


def _table(title: str, results: dict[str, Result]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("allocator", "ms a step", "of the arena's", "peak MB", "of the arena's"):
        table.add_column(column, justify="left" if column == "allocator" else "right")
    arena = results["arena"]
    for name, result in results.items():
        peak = median(step["memory"] for step in result.steps)
        of_arena = peak / median(step["memory"] for step in arena.steps)
        speed = result.seconds / arena.seconds
        table.add_row(name, f"{result.seconds * 1e3:,.0f}", f"{speed:.2f}", f"{peak / 1e6:,.0f}", f"{of_arena:.2f}")
    return table


if __name__ == "__main__":
    main()
