"""The plan of a run on this machine, its CPU or its GPU: memory, a step's time and the rates they were made from."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fathom.lab.planner.hardware import check
from fathom.lab.planner.local.gpu_rates import GpuMachine
from fathom.lab.planner.local.gpu_step import gpu_step_time
from fathom.lab.planner.local.peak import Peak, peak
from fathom.lab.planner.local.rates import Machine
from fathom.lab.planner.local.saved import Shape
from fathom.lab.planner.local.step import StepTime, step_time
from fathom.ops import cpu
from fathom.runtime.hardware import faster_dtype, keep_freed_memory
from fathom.train.gpu_memory import GpuMemory, gpu_memory
from fathom.train.run import Run


@dataclass(frozen=True)
class HerePlan:
    """What a step of `run` takes here."""

    run: Run
    peak: Peak | GpuMemory
    time: StepTime
    machine: Machine | GpuMachine

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.train.batch_size * self.run.train.sequence_length

    @property
    def flops(self) -> int:
        """Model FLOPs of a step, MTP included."""
        return self.tokens * self.run.model.flops_per_token(self.run.train.sequence_length, mtp=True)


def plan_here(run: Run, device: torch.device) -> HerePlan:
    """Measures the rates it needs, which takes some seconds, on a GPU half a minute.

    Raises ImportError where the CPU's kernels or its tensors' arena cannot be had, for its plan follows them;
    ConfigError without a GPU.
    """
    if device.type == "cuda":
        check(torch.cuda.is_available(), "gpu", device.type, "cpu here: torch finds no CUDA device")
    elif why := cpu.missing():
        raise ImportError(f"this machine's plan follows the CPU's kernels, which are missing: {why}")
    compute = run.train.compute_dtype
    dtype = faster_dtype(device) if compute == "auto" else getattr(torch, compute)
    train = replace(run.train, compute_dtype="float32" if dtype == torch.float32 else "bfloat16")
    run = replace(run, train=train)
    shape = shape_of(run)
    if device.type == "cuda":
        gpu = GpuMachine(dtype)
        return HerePlan(run, gpu_memory(run, shape.itemsize), gpu_step_time(run, shape, gpu), gpu)
    if why := keep_freed_memory():  # as a run does: passes over memory and holes between tensors depend on it
        raise ImportError(f"this machine's plan follows the arena of tensors, which cannot be had: {why}")
    machine = Machine(dtype)
    return HerePlan(run, peak(run, shape), step_time(run, shape, machine), machine)


def shape_of(run: Run) -> Shape:
    """A micro-batch of a run whose compute type is settled."""
    train = run.train
    itemsize = 4 if train.compute_dtype == "float32" else 2
    return Shape(run.model, train.micro_batch_size, train.sequence_length, itemsize, train.activation_checkpointing)


def here_json(plan: HerePlan) -> dict[str, Any]:
    """Everything, in bytes, seconds and FLOP/s."""
    return {
        "parameters": asdict(plan.run.model.parameter_counts()),
        "flops_per_step": plan.flops,
        "memory": asdict(plan.peak) | {"total": plan.peak.total},
        "step": asdict(plan.time) | {"total": plan.time.total},
        "tokens_per_second": plan.tokens / plan.time.total,
        "rates": {"products": plan.machine.products, **plan.machine.others()},
    }


def show_here(console: Console, plan: HerePlan) -> None:
    """Tables for a reader."""
    counts, train = plan.run.model.parameter_counts(), plan.run.train
    console.print(
        f"{(counts.total + counts.mtp) / 1e6:.1f}M parameters, {train.batch_size} x {train.sequence_length} tokens a "
        f"step in {train.compute_dtype}, {plan.run.optimizer.name}: {plan.tokens / plan.time.total:,.0f} tokens/s, "
        f"{plan.flops / plan.time.total / 1e9:.0f} GFLOP/s of model FLOPs",
        highlight=False,
    )
    memory = Table("at the peak, above the program", "MB", title="Memory", title_justify="left")
    for name, value in {**asdict(plan.peak), "total": plan.peak.total}.items():
        memory.add_row(name, f"{value / 1e6:.0f}")
    step = Table("part", "ms", title="Step", title_justify="left")
    for name, seconds in {**asdict(plan.time), "total": plan.time.total}.items():
        step.add_row(name, f"{seconds * 1e3:.1f}")
    rates = Table("measured here", "", title=f"Rates ({plan.machine.name})", title_justify="left")
    for name, value in plan.machine.others().items():
        rates.add_row(name.replace("_", " "), _with_unit(name, value))
    for name, flops in plan.machine.products.items():
        rates.add_row(name, f"{flops / 1e9:.0f} GFLOP/s")
    for table in (memory, step, rates):
        console.print(table)


def _with_unit(name: str, value: float) -> str:
    """Bytes a second, or seconds."""
    if name == "bandwidth":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value * 1e9:.3g} ns" if value < 1e-5 else f"{value * 1e3:.2f} ms"
