"""Reinforcement learning on the CPU against TRL on `transformers`, in the same run: `python benchmarks/posttrain.py`.

    python benchmarks/posttrain.py                  # a nano model with random weights
    python benchmarks/posttrain.py --model DIR      # a trained one, in which drafts are accepted
    python benchmarks/posttrain.py --quick          # small steps, few of them

A step samples answers of a fixed length to some problems and makes one update on all of them, without a KL: `fathom rl`
with its measurements, and TRL's `GRPOTrainer`, in float32 and in bfloat16, of which the faster one counts. Sides are
processes of their own (benchmarks/posttrain_side.py) that take their steps in turn; figures are medians. Without TRL
(`pip install trl`) its rows are left out.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from posttrain_side import Spec, Step
from rich.console import Console
from rich.table import Table
from rotation import Side, SideError, running
from side import HAS_PEAK_MEMORY, machine_facts

from fathom import presets
from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import train_tokenizer
from fathom.files import atomic_write
from fathom.model.transformer import Model

_WARM_UP = 1
"""First turns, not counted."""
_TURNS, _QUICK_TURNS = 5, 2
_FULL = Spec("fathom", "", problems=8, group_size=8, letters=64, max_tokens=128)
_QUICK = Spec("fathom", "", problems=2, group_size=8, letters=32, max_tokens=32)


class Row(NamedTuple):
    """One comparison. Where the goal is below 1, or says so, less is better."""

    name: str
    unit: str
    ours: float
    peer: float
    ratio: float
    goal: float | None = None
    less: bool = False


@dataclass(frozen=True)
class Result:
    """One side's counted steps."""

    steps: list[Step]

    @property
    def rollout_speed(self) -> float:
        """Sampled tokens per second."""
        return median(step.sampled / step.rollout for step in self.steps)

    @property
    def step_speed(self) -> float:
        """Steps per second."""
        return 1 / median(step.whole for step in self.steps)

    @property
    def update_speed(self) -> float:
        """Trained tokens per second of what is not sampling."""
        return median(step.tokens / (step.whole - step.rollout) for step in self.steps)

    @property
    def peak(self) -> int:
        """Bytes of the whole process."""
        return max(step.peak for step in self.steps)

    @property
    def own_peak(self) -> int:
        """Bytes above what the process had before there was a model."""
        return max(step.peak - step.imported for step in self.steps)


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such folder")  # before minutes are spent
    turns = _QUICK_TURNS if options.quick else _TURNS
    console = Console(width=130)
    without = _reason_without_trl()
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or _random_nano(Path(directory) / "nano")
        shape = replace(_QUICK if options.quick else _FULL, model=str(model))
        try:
            results = _measured(_specs(shape, with_trl=without is None), turns, Console(stderr=True))
        except SideError as error:
            Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
            sys.exit(1)
    rows = _rows(results)
    console.print(_title(shape, options, turns), style="bold", highlight=False)
    console.print(_table(rows))
    machine = _machine(options, turns, shape)
    for line in _below(results, machine, without):
        console.print(line, markup=False, highlight=False)
    if options.json:
        entries = [row._asdict() for row in rows]
        atomic_write(options.json, json.dumps({"machine": machine, "rows": entries}, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure rollouts and whole steps of reinforcement learning on the CPU against TRL's GRPOTrainer "
        "on transformers, side by side in one run, and peak memory against pretraining.",
        epilog="Every side is a process of its own, and they take their steps in turn. Figures are medians, without "
        f"the first {_WARM_UP} of the turns.",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's directory, instead of a random nano model")
    parser.add_argument("--quick", action="store_true", help=f"small steps, and {_QUICK_TURNS} turns, not {_TURNS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and the rows to FILE, too")
    return parser


# --------------------------------------------------------------------------------------------------------- measuring


def _random_nano(directory: Path) -> Path:
    """The preset nano with random weights, and a tokenizer with chat template, trained on this package's source."""
    source = Path(presets.__file__).parent.rglob("*.py")
    config = presets.nano().model
    tokenizer = train_tokenizer((file.read_text(encoding="utf-8") for file in sorted(source)), config.vocab_size)
    torch.manual_seed(0)
    save_model(Model(config), directory, tokenizer)
    return directory


def _reason_without_trl() -> str | None:
    missing = [name for name in ("trl", "transformers", "datasets", "accelerate") if find_spec(name) is None]
    return f"TRL was not measured: {', '.join(missing)} not installed (pip install trl)" if missing else None


def _specs(shape: Spec, with_trl: bool) -> dict[str, Spec]:
    trl = {f"TRL, {dtype}": replace(shape, program="trl", dtype=dtype) for dtype in ("float32", "bfloat16")}
    return {"fathom": shape, **(trl if with_trl else {}), "pretraining": replace(shape, program="pretraining")}


def _measured(specs: dict[str, Spec], turns: int, console: Console) -> dict[str, Result]:
    """Every side's steps, taken in turn; raises SideError where one ends early or has another number of tokens."""
    steps: dict[str, list[Step]] = {name: [] for name in specs}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for turn in range(_WARM_UP + turns):
            for name, spec in specs.items():
                if name not in sides:
                    # Pretraining's rows are as long as fathom's first samples turned out to be.
                    length = _length(spec, steps["fathom"][0]) if name == "pretraining" else 0
                    own = replace(spec, row_tokens=length)
                    sides[name] = stack.enter_context(running(name, own, "posttrain_side.py"))
                    sides[name].answer()
                steps[name].append(Step(**sides[name].request(f"step {turn}")))
                console.print(f"turn {turn + 1}: {name}, {steps[name][-1].whole:.2f} s", highlight=False)
                _check_tokens(name, steps[name][-1], steps["fathom"][-1])
    return {name: Result(taken[_WARM_UP:]) for name, taken in steps.items()}


def _length(spec: Spec, step: Step) -> int:
    """Tokens of a sample, prompt and answer."""
    return step.tokens // (spec.problems * spec.group_size)


def _check_tokens(name: str, step: Step, ours: Step) -> None:
    if step.tokens != ours.tokens or step.sampled not in (0, ours.sampled):
        raise SideError(f"{name} had {step.tokens} tokens, {step.sampled} of them sampled; fathom {ours.tokens}")


# ----------------------------------------------------------------------------------------------------------- showing


def _rows(results: dict[str, Result]) -> list[Row]:
    ours, pretraining = results["fathom"], results["pretraining"]
    peers = [result for name, result in results.items() if name.startswith("TRL")]
    rows = []
    if peers:
        speeds: Sequence[tuple[str, str, Callable[[Result], float], float | None]] = (
            ("rollout", "tokens/s", lambda side: side.rollout_speed, 5),
            ("whole steps", "per minute", lambda side: 60 * side.step_speed, 3),
            ("update, rewards and the rest", "tokens/s", lambda side: side.update_speed, None),
        )
        for name, unit, speed, goal in speeds:
            best = max(map(speed, peers))
            rows.append(Row(f"{name}, against TRL", unit, speed(ours), best, speed(ours) / best, goal))
    if HAS_PEAK_MEMORY:
        if peers:
            peak = min(peer.peak for peer in peers)
            rows.append(Row("peak memory, against TRL", "bytes", ours.peak, peak, ours.peak / peak, None, less=True))
        name = "peak memory, against our pretraining of as many tokens"
        ratio = ours.peak / pretraining.peak
        rows.append(Row(name, "bytes", ours.peak, pretraining.peak, ratio, 1.15, less=True))
        ratio = ours.own_peak / pretraining.own_peak
        name = "the same, above what the process had at its start"
        rows.append(Row(name, "bytes", ours.own_peak, pretraining.own_peak, ratio, None, less=True))
    return rows


def _title(shape: Spec, options: argparse.Namespace, turns: int) -> str:
    model = options.model or "a random nano model"
    quick = " (QUICK: goals are meant for the full run)" if options.quick else ""
    return (
        f"{model} in float32, {shape.problems} problems x {shape.group_size} answers of {shape.max_tokens} tokens, "
        f"medians of {turns} turns{quick}"
    )


def _table(rows: list[Row]) -> Table:
    table = Table("what")
    for name in ("ours", "peer", "ratio", "goal"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reached", no_wrap=True)
    for row in rows:
        figures = (_with_unit(row.ours, row.unit), _with_unit(row.peer, row.unit), f"{row.ratio:.2f}")
        table.add_row(row.name, *figures, "" if row.goal is None else f"{row.goal:g}", _reached(row))
    return table


def _with_unit(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f}" if unit == "tokens/s" else f"{value:.2f}"


def _reached(row: Row) -> str:
    if row.goal is None:
        return ""
    return "[green]goal[/]" if (row.ratio <= row.goal if row.less else row.ratio >= row.goal) else "[red]not[/]"


def _below(results: dict[str, Result], machine: dict[str, Any], without: str | None) -> list[str]:
    lines = [f"{without}"] if without else []
    for name, side in results.items():
        rollout = f"rollout {side.rollout_speed:,.0f} tokens/s, " if name != "pretraining" else ""
        peak = f", peak {side.peak / 2**20:,.0f} MiB" if HAS_PEAK_MEMORY else ""
        lines.append(f"{name}: {rollout}{1 / side.step_speed:.2f} s a step, {side.update_speed:,.0f} tokens/s{peak}")
    return [
        *lines,
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}",
        ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "trl") if machine[name]),
    ]


def _machine(options: argparse.Namespace, turns: int, shape: Spec) -> dict[str, Any]:
    """Where and how the rows were measured; None for what is not installed."""
    return {
        **machine_facts(),
        "trl": version("trl") if find_spec("trl") else None,
        "model": str(options.model or "random nano"),
        "problems": shape.problems,
        "group_size": shape.group_size,
        "max_tokens": shape.max_tokens,
        "quick": options.quick,
        "turns": turns,
    }


if __name__ == "__main__":
    main()
