"""Training speed and memory on the CPU against `transformers`, in the same run: `python benchmarks/train.py`.

Prints a table and, with --json, writes its rows. Each row has a floor that must hold and a goal to reach; both are
meant for the full run on a CPU with bfloat16 matrix instructions.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rotation import WARM_UP, Group, Outcome, Result, SideError, measure
from side import HAS_PEAK_MEMORY, Spec, machine_facts

from fathom.files import atomic_write
from fathom.model.config import ModelConfig
from fathom.presets import bench_small
from fathom.runtime.hardware import compile_unavailable_reason

_TURNS, _QUICK_TURNS = 11, 3
_BATCH, _QUICK_BATCH = 8, 4
_LENGTH, _LONG = 512, 4096
_ADAMW_BYTES = 28
"""Per parameter and step: AdamW reads weight, gradient and two moments, and writes all but the gradient, in float32."""


class Comparison(NamedTuple):
    """What a row shows; floor and goal are for the ratio."""

    ours: float
    peer: float | None
    ratio: float


class Row(NamedTuple):
    """One comparison: the sides it needs, of which group, and what to make of their results."""

    name: str
    unit: str
    group: str
    sides: tuple[str, ...]
    figures: Callable[..., Comparison]
    """From the measured peak FLOP/s and the sides' results."""
    floor: float | None = None
    goal: float | None = None


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")  # before minutes are spent
    batch, turns = (_QUICK_BATCH, _QUICK_TURNS) if options.quick else (_BATCH, _TURNS)
    try:
        rows = _chosen(_rows(batch), options.only)
        outcomes = _measured(_needed(_groups(batch, options.compile), rows), turns)
    except (SideError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    found = [(row, _figures(row, outcomes[row.group])) for row in rows]
    machine = _machine(options, turns, outcomes)
    console = Console(width=130)
    console.print(_title(batch, turns, options.quick), style="bold", highlight=False)
    console.print(_table(found))
    for line in _below(machine, outcomes):
        console.print(line, markup=False, highlight=False)
    if options.json:
        atomic_write(options.json, json.dumps({"machine": machine, "rows": _entries(found)}, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure fathom's training on the CPU against transformers', side by side in one run. On two cores "
        "it takes up to ten minutes, and at most 20 GB of memory.",
        epilog="Every side is a process of its own, and they take their steps in turn. Times are medians, without the "
        f"first {WARM_UP} turns.",
    )
    quick = f"about two minutes: batches half as large, and {_QUICK_TURNS} counted turns instead of {_TURNS}"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and the rows to FILE, too")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the rows that have WORDS in their name")
    compiled = "compile fathom's layers (what the compiler itself holds then counts as their memory)"
    parser.add_argument("--compile", action="store_true", help=compiled)
    return parser


# -------------------------------------------------------------------------------------------------- what is compared


def _groups(batch: int, compiled: bool) -> dict[str, Group]:
    """Sides by the group they take turns in; one group at a time is in memory."""
    shape = replace(bench_small().model, num_nextn_predict_layers=0)
    ours = Spec("fathom", shape, batch, _LENGTH, compile=compiled)
    peer = replace(ours, program="transformers-moe", compile=False)
    ours_narrow = replace(ours, shape=_narrow(), batch=2 * batch, length=256)
    peer_narrow = replace(ours_narrow, program="transformers-moe", compile=False)
    return {
        "programs": Group(
            {
                "fathom": ours,
                "transformers, tuned malloc": peer,
                "transformers, default malloc": replace(peer, allocator="default"),
            }
        ),
        "shapes": Group(
            {
                "fathom": ours,
                "fathom, one MTP module": replace(ours, shape=replace(shape, num_nextn_predict_layers=1)),
                "fathom, long sequence": replace(ours, batch=1, length=_LONG),
            }
        ),
        "experts": Group(
            {
                "fathom, 32 experts": replace(ours, shape=replace(shape, n_routed_experts=32)),
                "fathom, 256 experts": replace(ours, shape=replace(shape, n_routed_experts=256)),
            },
            bandwidth=True,
        ),
        "dense": Group(
            {
                "fathom, narrow": ours_narrow,
                "transformers, narrow": peer_narrow,
                "transformers, dense Llama": replace(peer_narrow, program="transformers-llama"),
            }
        ),
    }


def _narrow() -> ModelConfig:
    """A mixture with about as many active weights as a dense Llama of its width and depth."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        moe_intermediate_size=128,
        num_hidden_layers=6,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_nextn_predict_layers=0,
        max_position_embeddings=1024,
        initializer_range=0.02,
    )


def _rows(batch: int) -> list[Row]:
    """Every row of the table, with its floor and its goal."""
    tuned = ("fathom", "transformers, tuned malloc")
    default = ("fathom", "transformers, default malloc")
    rows = [
        Row("tokens/s, both allocators tuned", "tokens/s", "programs", tuned, _speeds, 2, 3),
        Row("tokens/s, out of the box", "tokens/s", "programs", default, _speeds, 2.7, 4),
        Row("MFU, no MTP", "of peak", "programs", tuned, _mfu, 0.42, 0.63),
        Row("MFU, one MTP module", "of peak", "shapes", ("fathom, one MTP module",), _mfu, 0.42, 0.63),
    ]
    if HAS_PEAK_MEMORY:
        name = "peak memory above weights, gradients, moments"
        rows.append(Row(name, "bytes", "programs", default, _memory, 0.5, 0.333))
    experts = ("fathom, 256 experts", "fathom, 32 experts")
    lengths = ("fathom, long sequence", "fathom")
    dense = ("fathom, narrow", "transformers, dense Llama")
    peers_dense = ("transformers, narrow", "transformers, dense Llama")
    return [
        *rows,
        Row("256 experts against 32, forward + backward", "tokens/s", "experts", experts, _pass_speeds, 0.8, 0.92),
        Row(f"MFU at {_LONG} x 1 against {_LENGTH} x {batch}", "of peak", "shapes", lengths, _mfu_ratio, 0.85, 0.95),
        Row("tokens/s, our MoE against transformers' dense Llama", "tokens/s", "dense", dense, _speeds, 0.9, 1.3),
        Row("tokens/s, transformers' MoE against its dense Llama", "tokens/s", "dense", peers_dense, _speeds),
    ]


def _speeds(_peak: float, ours: Result, peer: Result) -> Comparison:
    return _ratio(ours.tokens / ours.seconds, peer.tokens / peer.seconds)


def _pass_speeds(_peak: float, ours: Result, peer: Result) -> Comparison:
    return _ratio(ours.tokens / ours.seconds_of("fb"), peer.tokens / peer.seconds_of("fb"))


def _memory(_peak: float, ours: Result, peer: Result) -> Comparison:
    return _ratio(ours.memory, peer.memory)


def _mfu_ratio(peak: float, ours: Result, peer: Result) -> Comparison:
    return _ratio(ours.mfu(peak), peer.mfu(peak))


def _mfu(peak: float, ours: Result, peer: Result | None = None) -> Comparison:
    """Here floor and goal are for the fraction itself."""
    return Comparison(ours.mfu(peak), peer.mfu(peak) if peer else None, ours.mfu(peak))


def _ratio(ours: float, peer: float) -> Comparison:
    return Comparison(ours, peer, ours / peer)


def _figures(row: Row, outcome: Outcome) -> Comparison:
    return row.figures(outcome.peak, *(outcome.sides[name] for name in row.sides))


# -------------------------------------------------------------------------------------------------------- measuring


def _chosen(rows: list[Row], words: str) -> list[Row]:
    """The selected rows."""
    chosen = [row for row in rows if words.lower() in row.name.lower()]
    if not chosen:
        names = "\n".join(f"  {row.name}" for row in rows)
        raise ValueError(f"no row has «{words}» in its name; there are\n{names}")
    return chosen


def _needed(groups: dict[str, Group], rows: list[Row]) -> dict[str, Group]:
    """The sides that the rows need, in their groups; raises where a package or compiler they need is missing."""
    names = {(row.group, side) for row in rows for side in row.sides}
    needed = {}
    for name, group in groups.items():
        if sides := {side: spec for side, spec in group.sides.items() if (name, side) in names}:
            needed[name] = replace(group, sides=sides)
    specs = [spec for group in needed.values() for spec in group.sides.values()]
    if any(spec.program != "fathom" for spec in specs) and find_spec("transformers") is None:
        raise ValueError("transformers is not installed; it is one of the tests' packages: `make check` installs it")
    lacking = compile_unavailable_reason(torch.device("cpu"))
    if any(spec.compile for spec in specs) and lacking:
        raise ValueError(f"--compile is given, but {lacking}")
    return needed


def _measured(groups: dict[str, Group], turns: int) -> dict[str, Outcome]:
    """Every group's outcome, one group after another."""
    steps = (WARM_UP + turns) * sum(len(group.sides) for group in groups.values())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=steps)

        def report(side: str) -> None:
            progress.update(task, description=side, advance=1)

        outcomes = {}
        for name, group in groups.items():
            progress.update(task, description="starting " + " and ".join(group.sides))
            outcomes[name] = measure(group, turns, report)
        return outcomes


# ---------------------------------------------------------------------------------------------------------- showing


def _table(found: list[tuple[Row, Comparison]]) -> Table:
    table = Table("what")
    for name in ("ours", "peer", "ratio", "floor", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reached", no_wrap=True)
    for row, (ours, peer, ratio) in found:
        targets = ("" if target is None else f"{target:g}" for target in (row.floor, row.goal))
        shown = (_with_unit(ours, row.unit), "" if peer is None else _with_unit(peer, row.unit), f"{ratio:.3f}")
        table.add_row(row.name, *shown, *targets, _reached(row, ratio))
    return table


def _title(batch: int, turns: int, quick: bool) -> str:
    warning = " (QUICK: floors and goals are meant for the full run)" if quick else ""
    return f"Training on the CPU in bfloat16, {batch} x {_LENGTH} tokens a step, medians of {turns} turns{warning}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f}" if unit == "tokens/s" else f"{value:.3f}"


def _reached(row: Row, ratio: float) -> str:
    """In words and colour; a goal below its floor means that less is better."""
    if row.floor is None or row.goal is None:
        return ""
    sign = 1 if row.goal > row.floor else -1
    if sign * ratio >= sign * row.goal:
        return "[green]goal[/]"
    return "[yellow]floor[/]" if sign * ratio >= sign * row.floor else "[red]neither[/]"


def _below(machine: dict[str, Any], outcomes: dict[str, Outcome]) -> list[str]:
    """What the table needs to be read: conventions, costs that explain a row, the machine."""
    lines = [
        "ratio: ours / peer; in the rows «MFU, …» our fraction itself.",
        "peer: transformers; where numbers of experts or lengths are compared, fathom in the other setting.",
    ]
    if "experts" in outcomes:
        lines += _optimizer_lines(outcomes["experts"])
    if "dense" in outcomes:
        lines += _active_lines(outcomes["dense"])
    bandwidth = machine["bandwidth"]
    read = f", {bandwidth / 1e9:.1f} GB/s read from memory" if bandwidth else ""
    return [
        *lines,
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}: "
        f"{machine['peak'] / 1e9:.0f} GFLOP/s at best{read}",
        f"torch {machine['torch']}, transformers {machine['transformers']}; fathom's layers "
        f"{'compiled' if machine['compiled'] else 'not compiled'}",
    ]


def _optimizer_lines(outcome: Outcome) -> list[str]:
    """AdamW moves bytes and computes next to nothing: memory's bandwidth bounds its step."""
    bandwidth = median(outcome.bandwidths)
    lines = []
    for name, side in outcome.sides.items():
        parameters, seconds = side.sizes["parameters"], side.seconds_of("optimizer")
        bound = _ADAMW_BYTES * parameters / bandwidth
        lines.append(
            f"{name}: optimizer step {seconds * 1e3:.0f} ms, {seconds / bound:.2f} times the {bound * 1e3:.0f} ms that "
            f"{_ADAMW_BYTES} bytes for each of {parameters / 1e6:.1f}M parameters take at {bandwidth / 1e9:.1f} GB/s"
        )
    return lines


def _active_lines(outcome: Outcome) -> list[str]:
    """Weights that multiply one token's activations."""
    lines = []
    for name, side in outcome.sides.items():
        dense = side.spec.program == "transformers-llama"
        active = side.sizes["linear"] if dense else side.spec.shape.parameter_counts().active_matrices
        lines.append(f"{name}: {active / 1e6:.2f}M active matrix weights")
    return lines


def _machine(options: argparse.Namespace, turns: int, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Where and how the rows were measured; None for what was not."""
    bandwidths = [value for outcome in outcomes.values() for value in outcome.bandwidths]
    return {
        **machine_facts(),
        "peak": median(value for outcome in outcomes.values() for value in outcome.peaks),
        "bandwidth": median(bandwidths) if bandwidths else None,
        "compiled": options.compile,
        "quick": options.quick,
        "turns": turns,
    }


def _entries(found: list[tuple[Row, Comparison]]) -> list[dict[str, Any]]:
    """The rows as they are written to a file."""
    return [
        {"name": row.name, "unit": row.unit, **figures._asdict(), "floor": row.floor, "goal": row.goal}
        for row, figures in found
    ]


if __name__ == "__main__":
    main()
