"""Tokens per second by context length and by concurrency, plotted: `python benchmarks/curves.py`.

    python benchmarks/curves.py --figure FILE.png --json FILE.json

bench-medium with random weights in bfloat16 beside the peers of benchmarks/decode.py, in the same turns; then drafting
with the demo's model (`make demo`, or --demo) on held-out code. Peers stop where prefill takes minutes.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from decode import Drafting, HeldOut, Programs, in_turn, settle
from decoders import Steps, random_prompts
from matplotlib import pyplot
from rich.console import Console
from rich.table import Table
from side import cpu_model

from fathom.files import atomic_write

CONTEXTS = (512, 2048, 4096, 8192, 16384)
CONCURRENCY = (1, 2, 4, 8, 16, 32)
LONGEST = {"transformers": 4096, "llama.cpp bf16": 8192}
"""Context up to which a peer is measured."""

SHORT = 128
"""Prompt of each sequence where several are decoded."""

Curve = dict[int, float]
"""Tokens per second by context length or by number of sequences."""


class Panel(NamedTuple):
    title: str
    axis: str
    curves: dict[str, Curve]


def over_contexts(programs: Programs) -> Panel:
    curves = _curves(programs, CONTEXTS, lambda length: [length], LONGEST)
    return Panel("bench-medium, one sequence", "context, tokens", curves)


def over_sequences(programs: Programs) -> Panel:
    curves = _curves(programs, CONCURRENCY, lambda count: [SHORT] * count, {})
    return Panel(f"bench-medium, {SHORT}-token prompts", "sequences", curves)


def _curves(
    programs: Programs, places: Sequence[int], lengths: Callable[[int], list[int]], longest: dict[str, int]
) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for place in places:
        prompts = random_prompts(programs.config.vocab_size, lengths(place))
        sides: dict[str, Steps] = {
            side.name: side.steps(prompts)
            for side in (programs.fathom, programs.transformers, programs.llama)
            if side is not None and place <= longest.get(side.name, place)
        }
        for name, seconds in in_turn(sides).items():
            curves.setdefault(name, {})[place] = len(prompts) / seconds
    return curves


def drafting(demo: Path) -> Panel:
    """Adaptive draft length against no drafts."""
    held_out = HeldOut.of(demo, torch.device("cpu"))
    prompts = held_out.prompts
    curves: dict[str, Curve] = {"without drafts": {}, "adaptive draft length": {}}
    for batch in CONCURRENCY:
        engines = [Drafting(held_out.model, speculative, batch) for speculative in (0, True)]
        groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
        rates: list[list[float]] = [[], []]
        for turn in range(max(4, len(groups)) + 2):
            for engine, rate in zip(engines, rates, strict=True):
                before = engine.tokens, engine.seconds
                engine.go_on(groups[turn % len(groups)], counted=turn > 1)
                if turn > 1:  # engines warm up and measure the cost and gain of drafts
                    rate.append((engine.tokens - before[0]) / (engine.seconds - before[1]))
        for curve, rate in zip(curves.values(), rates, strict=True):
            curve[batch] = median(rate)
    return Panel("the demo's model, held-out code", "sequences", curves)


def measured(demo: Path, console: Console) -> Iterator[Panel]:
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs.around("bench-medium", Path(folder))
        yield over_contexts(programs)
        yield over_sequences(programs)
    if demo.is_dir():
        yield drafting(demo)
    else:
        console.print(f"no demo in {demo}: drafting is not measured (make demo)", style="yellow")


def draw(panels: Sequence[Panel], machine: str, path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for panel, ax in zip(panels, axes, strict=True):
        for (name, curve), marker in zip(panel.curves.items(), "os^", strict=False):
            ax.plot(list(curve), list(curve.values()), marker=marker, label=name)
        places = sorted({place for curve in panel.curves.values() for place in curve})
        ax.set_xscale("log", base=2)
        ax.set_xticks(places, [f"{place // 1024}K" if place >= 1024 else str(place) for place in places])
        room = 1.35 * max(rate for curve in panel.curves.values() for rate in curve.values())  # for the legend
        ax.set(title=panel.title, xlabel=panel.axis, ylabel="tokens/s", ylim=(0, room))
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, loc="upper left")
    figure.suptitle(machine, fontsize="small", color="gray")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of a demo's run")
    parser.add_argument("--figure", type=Path, help="write the plot to this file (.png, .svg)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    settle("cpu")
    console = Console(width=120)
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16"
    panels = []
    for panel in measured(options.demo, console):
        panels.append(panel)
        places = sorted({place for curve in panel.curves.values() for place in curve})
        table = Table(panel.axis, *map(str, places), title=f"{panel.title}: tokens/s", box=None)
        for name, curve in panel.curves.items():
            table.add_row(name, *(f"{curve[place]:.4g}" if place in curve else "" for place in places))
        console.print(table)
    console.print(machine, highlight=False)
    if options.figure:
        draw(panels, machine, options.figure)
    if options.json:
        content = {"machine": machine, "panels": [panel._asdict() for panel in panels]}
        atomic_write(options.json, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
