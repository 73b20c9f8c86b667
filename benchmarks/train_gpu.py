"""Training speed and memory on one CUDA GPU against `transformers` on the same card: `python benchmarks/train_gpu.py`.

Prints a table and, with --json, writes its rows. Sides run one after another, each alone on the card; all have imported
what they need by then. Fathom's come first, and whatever a side does, the rows of those before it are printed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rotation import SideError, running
from side_gpu import COUNTED, Spec

from fathom.files import atomic_write
from fathom.presets import moe_16b_a3b

_LENGTH = 4096
_GOAL = 0.45
"""MFU that a step should reach."""
_SECONDS = 170
"""Seconds for all sides together; what would take longer is ended."""
_STACK, _WHOLE = "layers of 16b-a3b", "1B-A0.2B"


class Result(NamedTuple):
    """A side's measurements, and what is derived from them."""

    spec: Spec
    answer: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Median of a step."""
        return median(self.answer["seconds"])

    @property
    def tokens_per_second(self) -> float:
        """Trained, optimizer and all."""
        return self.spec.micro_batches * self.spec.micro_batch * self.spec.length / self.seconds

    def mfu(self, peak: float) -> float:
        """Model FLOPs per second over the peak."""
        return self.tokens_per_second * self.spec.shape.flops_per_token(self.spec.length, mtp=True) / peak


def specs() -> dict[str, Spec]:
    """The sides, by name."""
    preset = replace(moe_16b_a3b().model, num_nextn_predict_layers=0, vocab_size=32768)
    # One dense layer and three MoE ones: what, with weights and moments, leaves room for activations on 80 GB.
    stack = Spec("fathom", replace(preset, num_hidden_layers=4), 4, 4, _LENGTH, compile=True)
    small = replace(
        preset,
        hidden_size=1280,
        intermediate_size=3584,
        moe_intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=8,
        n_routed_experts=48,
        n_shared_experts=1,
        num_experts_per_tok=4,
        routed_scaling_factor=1.0,
    )
    whole = replace(stack, shape=small)
    ours = {_STACK: stack, _WHOLE: whole}
    sides = {f"{name}: fathom": spec for name, spec in ours.items()}
    for side, compiled in (("transformers", False), ("transformers, compiled", True)):
        for name, spec in ours.items():
            sides[f"{name}: {side}"] = replace(spec, program="transformers", compile=compiled)
    return sides


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here; benchmarks/train.py measures the CPU")
    sides = {name: spec for name, spec in specs().items() if options.only in name}
    console = Console(width=130)
    results: dict[str, Result] = {}
    for name, result in _measured(sides):
        if isinstance(result, SideError):
            console.print(str(result), style="bold red", markup=False, highlight=False, soft_wrap=True)
            continue
        results[name] = result
        console.print(f"{name}: {result.seconds * 1e3:.1f} ms a step", highlight=False)
        if options.json:
            atomic_write(options.json, json.dumps(_report(results), indent=1) + "\n")
    if not results:
        sys.exit(1)
    report = _report(results)
    console.print(_table(report["rows"]))
    console.print(
        f"{report['device']}: {report['peak'] / 1e12:.0f} TFLOP/s in bfloat16 at best; torch {report['torch']}, "
        f"transformers {report['transformers']}; medians of {COUNTED} steps",
        highlight=False,
    )


def _report(results: dict[str, Result]) -> dict[str, Any]:
    """Machine, rows of the table, and the sides' measurements."""
    first = next(iter(results.values())).answer
    peak = max(result.answer["peak"] for result in results.values())
    return {
        "device": first["device"],
        "peak": peak,
        "torch": first["torch"],
        "transformers": version("transformers") if find_spec("transformers") else None,
        "rows": _rows(results, peak),
        "sides": {name: result.answer for name, result in results.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure fathom's training on one CUDA GPU of 80 GB against transformers'; about three minutes.",
        epilog="transformers keeps weights and moments in bfloat16, fathom in float32: see benchmarks/side_gpu.py.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and the rows to FILE, too")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the sides that have WORDS in their name")
    return parser


def _measured(sides: dict[str, Spec]) -> Iterator[tuple[str, Result | SideError]]:
    """Each side's result, or how it failed."""
    end = time.monotonic() + _SECONDS
    with ExitStack() as all_sides:
        contexts = {name: all_sides.enter_context(ExitStack()) for name in sides}
        started = {name: contexts[name].enter_context(running(name, sides[name], "side_gpu.py")) for name in sides}
        for name, side in started.items():
            try:
                side.answer()
                yield name, Result(sides[name], side.request("measure", max(1.0, end - time.monotonic())))
            except SideError as error:
                yield name, error
            contexts[name].close()  # the card is free again


_FIGURES: dict[str, Callable[[Result, float], float]] = {
    "tokens/s": lambda result, peak: result.tokens_per_second,
    "MFU": Result.mfu,
    "peak memory above weights, gradients, moments": lambda result, peak: result.answer["above"],
    "peak memory": lambda result, peak: result.answer["memory"],
}


def _rows(results: dict[str, Result], peak: float) -> list[dict[str, Any]]:
    """A row for every model and figure, against the faster of the peers."""
    rows = []
    for model in (_STACK, _WHOLE):
        ours = results.get(f"{model}: fathom")
        peers = [r for name, r in results.items() if name.startswith(f"{model}: transformers")]
        peer = max(peers, key=lambda result: result.tokens_per_second, default=None)
        for what, figure in _FIGURES.items():
            rows.append(
                {
                    "name": f"{model}, {what}",
                    "ours": None if ours is None else figure(ours, peak),
                    "peer": None if peer is None else figure(peer, peak),
                    "peer_compiled": None if peer is None else peer.spec.compile,
                    "goal": _GOAL if what == "MFU" else None,
                }
            )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("what")
    for name in ("ours", "transformers", "ratio", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ours, peer, goal = row["ours"], row["peer"], row["goal"]
        ratio = f"{ours / peer:.2f}" if ours and peer else ""
        compiled = " (compiled)" if row["peer_compiled"] else ""
        shown = (_shown(row["name"], ours), _shown(row["name"], peer) + compiled, ratio)
        table.add_row(row["name"], *shown, "" if goal is None else f"{goal:g}")
    return table


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if "memory" in name:
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.3f}" if "MFU" in name else f"{value:,.0f}"


if __name__ == "__main__":
    main()
