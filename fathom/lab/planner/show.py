"""A plan as tables, and as JSON."""

from dataclasses import asdict, fields, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.memory import Serving
from fathom.lab.planner.plan import Plan, make_plan

_GB = 1e9


def plan_json(plan: Plan, tokens: float, price: float, serving: Serving) -> dict[str, Any]:
    """Everything, in plain units: bytes, seconds, FLOPs, dollars."""
    hours = plan.gpu_hours(tokens)
    return {
        "parameters": asdict(plan.config.parameter_counts()),
        "flops_per_token": plan.config.flops_per_token(plan.layout.length, mtp=True),
        "flops_per_step": plan.flops,
        "tokens_per_step": plan.tokens,
        "cluster": asdict(plan.cluster),
        "layout": asdict(plan.layout) | {"data": plan.layout.data(plan.cluster)},
        "assumptions": asdict(plan.assumed),
        "memory": asdict(plan.memory) | {"total": plan.memory.total, "fits": plan.fits},
        "serving": asdict(serving),
        "communication": asdict(plan.communication),
        "chunks": asdict(plan.chunks),
        "step": asdict(plan.time) | {"total": plan.time.total},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu(),
        "mfu_without_mtp": plan.mfu(mtp=False),
        "budget": {"tokens": tokens, "gpu_hours": hours, "cost": hours * price, "price": price},
    }


def show_plan(console: Console, plan: Plan, tokens: float, price: float, serving: Serving) -> None:
    """Tables for a reader."""
    for table in (_summary(plan, tokens, price), _memory(plan), _communication(plan), _step(plan)):
        console.print(table)
    console.print(
        f"To serve: {serving.weights / _GB:.1f} GB of weights, {serving.cache_per_token:,} bytes of cache per token, "
        f"{serving.cache / _GB:.1f} GB for all requests: {serving.gpus} GPUs hold it.",
        highlight=False,
    )
    console.print(_assumptions(plan.assumed))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _summary(plan: Plan, tokens: float, price: float) -> Table:
    counts, layout, hours = plan.config.parameter_counts(), plan.layout, plan.gpu_hours(tokens)
    spread = (
        f"{layout.pipeline} pipeline ({layout.schedule}) x {layout.tensor} tensor x {layout.data(plan.cluster)} data"
    )
    table = _table("Plan", "", "")
    for name, value in (
        (
            "parameters",
            f"{counts.total / 1e9:.2f}B, {counts.active / 1e9:.2f}B active, {counts.mtp / 1e9:.2f}B in MTP modules",
        ),
        ("FLOPs", f"{plan.flops / plan.tokens / 1e9:.1f} G per token, {plan.flops:.3g} per step"),
        ("GPUs", f"{plan.cluster.gpus}: {spread}, {layout.expert} expert, ZeRO-{layout.zero}"),
        (
            "batch",
            f"{layout.global_batch} x {layout.length} tokens, {layout.micro_batches(plan.cluster)} micro-batches",
        ),
        ("step", f"{plan.time.total:.2f} s, {plan.tokens_per_second:,.0f} tokens/s"),
        ("MFU (of the bf16 peak)", f"{plan.mfu():.1%}; without MTP's FLOPs {plan.mfu(mtp=False):.1%}"),
        (f"{tokens / 1e12:g}T tokens", f"{hours:,.0f} GPU-hours, {hours / plan.cluster.gpus / 24:,.1f} days"),
        (f"at {price:g} an hour", f"{hours * price:,.0f}"),
    ):
        table.add_row(name, value)
    return table


def _memory(plan: Plan) -> Table:
    table = _table("Memory of the fullest GPU", "part", "GB")
    for name, value in asdict(plan.memory).items():
        table.add_row(name, f"{value / _GB:.1f}")
    verdict = "fits" if plan.fits else "does NOT fit"
    table.add_row(f"total ({verdict} in {plan.cluster.gpu.memory / _GB:.0f})", f"{plan.memory.total / _GB:.1f}")
    return table


def _communication(plan: Plan) -> Table:
    table = _table("Sent by a GPU in a step", "kind", "network GB", "NVLink GB", "seconds by itself")
    for field in fields(plan.communication):
        traffic = getattr(plan.communication, field.name)
        seconds = traffic.seconds(plan.cluster, plan.assumed)
        table.add_row(field.name, f"{traffic.network / _GB:.2f}", f"{traffic.link / _GB:.2f}", f"{seconds:.3f}")
    return table


def _step(plan: Plan) -> Table:
    table = _table("Step", "part", "seconds", "share")
    for name, value in asdict(plan.time).items():
        table.add_row(name, f"{value:.3f}", f"{value / plan.time.total:.1%}")
    return table


def _assumptions(assumed: Assumptions) -> Table:
    table = _table("Assumed (each is a flag, --assume.NAME; --help names the sources)", "name", "value")
    for name, value in asdict(assumed).items():
        table.add_row(name.replace("_", "-"), f"{value:g}")
    return table


def sensitivity(plan: Plan) -> list[tuple[str, float, float, float]]:
    """(assumption, value, changed value, GPU-hours relative to the plan's), each made a tenth worse."""
    rows = []
    for name, value in asdict(plan.assumed).items():
        if name == "reserved":  # costs memory, not time
            continue
        worse = _worse(name, value)
        changes: dict[str, Any] = {name: worse}
        changed = make_plan(plan.config, plan.layout, plan.cluster, replace(plan.assumed, **changes))
        rows.append((name, value, worse, plan.tokens_per_second / changed.tokens_per_second - 1))
    return rows


def _worse(name: str, value: float) -> float:
    if name == "communication_multiprocessors":
        return round(value * 1.1)
    if name in ("overlap_alone", "gradient_overlap") and value == 0:
        return 0.1  # better: it cannot get any worse
    return value + 0.1 if name in ("imbalance", "lost") else value * 0.9


def show_sensitivity(console: Console, plan: Plan) -> None:
    """The effect of each assumption on the time."""
    table = _table("GPU-hours if an assumption is off", "assumption", "assumed", "instead", "GPU-hours")
    for name, value, changed, effect in sensitivity(plan):
        table.add_row(name.replace("_", "-"), f"{value:g}", f"{changed:g}", f"{effect:+.1%}")
    console.print(table)
