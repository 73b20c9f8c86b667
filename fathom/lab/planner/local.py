"""The plan of a run on this machine, its CPU or one GPU: a few real optimizer steps, timed.

Steps of one and of several micro-batches (four, where the run has so many) are timed in turn, on random tokens and
freshly initialised weights. Each further micro-batch adds one forward and backward pass and nothing else, so the
duration of a step is a straight line in their number. All other figures are measured or follow from the configuration.
"""

import resource
import sys
import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fathom.config import ConfigError
from fathom.data.batch import Batch, next_token_batch
from fathom.distributed.ranks import Ranks
from fathom.lab.planner.hardware import check
from fathom.runtime.hardware import free_memory, install_allocator
from fathom.train.estimate import Estimate, estimate, memory_refusal
from fathom.train.pretrain import pretrain_step
from fathom.train.progress import duration
from fathom.train.run import Run
from fathom.train.schedule import batch_sizes
from fathom.train.setup import build_state, compute_dtype, resolve_auto
from fathom.train.step import TrainState

TIMED_STEPS = 3
"""Of each size."""
_MOST_MICRO_BATCHES = 4
"""More would make the extrapolation to large batches less sensitive to noise, and the command slower."""
_GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Measurements of steps of one size; a first step, which allocates and compiles, is not among them."""

    micro_batches: int
    seconds: tuple[float, ...]
    """Of each timed step."""
    peak_memory: int
    """Bytes: on a CPU of the whole process, the program included; on a GPU of its tensors."""

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)


@dataclass(frozen=True)
class LocalPlan:
    """The costs of `run`, whose compute type is resolved, on `device`."""

    run: Run
    device: str
    needs: Estimate
    """The estimate by which a run is refused before it starts."""
    one: Timing
    """Of steps of one micro-batch."""
    several: Timing
    """Of larger steps."""

    @property
    def micro_batches(self) -> int:
        """Of a step at the full batch size."""
        return self.run.train.batch_size // self.run.train.micro_batch_size

    @property
    def extrapolated(self) -> bool:
        """Whether a step is larger than what was timed."""
        return self.micro_batches > self.several.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """At the full batch size."""
        return self.run.train.batch_size * self.run.train.sequence_length

    @property
    def seconds_per_step(self) -> float:
        """At the full batch size."""
        return self.step_seconds(self.micro_batches)

    @property
    def tokens_per_second(self) -> float:
        """At the full batch size."""
        return self.tokens_per_step / self.seconds_per_step

    @property
    def flops_per_second(self) -> float:
        """Model FLOPs, those of the MTP modules included."""
        per_token = self.run.model.flops_per_token(self.run.train.sequence_length, mtp=True)
        return self.tokens_per_second * per_token

    @property
    def peak_memory(self) -> int:
        """Bytes; a third micro-batch takes no more than a second."""
        return (self.one if self.micro_batches == 1 else self.several).peak_memory

    @property
    def run_seconds(self) -> float:
        """All steps of the run, its batch ramp included, without evaluations and checkpoints."""
        sizes, steps = np.unique(batch_sizes(self.run.train) // self.run.train.micro_batch_size, return_counts=True)
        return sum(self.step_seconds(int(size)) * int(count) for size, count in zip(sizes, steps, strict=True))

    def step_seconds(self, micro_batches: int) -> float:
        """Duration of a step of `micro_batches` micro-batches."""
        if micro_batches == 1:
            return self.one.median
        # Noise may make the larger step the faster one where both are tiny.
        each = max(0.0, self.several.median - self.one.median) / (self.several.micro_batches - 1)
        return self.several.median + (micro_batches - self.several.micro_batches) * each


def plan_local(run: Run, device: torch.device) -> LocalPlan:
    """Train `run`'s model for a few steps on `device`.

    Raises ConfigError without such a device, or where the run does not fit into the memory that is free.
    """
    if device.type == "cuda":
        check(torch.cuda.is_available(), "gpu", device.type, "cpu here: torch finds no CUDA device")
    else:
        install_allocator()  # as `fathom train` does; where it cannot, neither can training
    ranks = Ranks(0, 1, device)
    run = replace(run, train=resolve_auto(run.train, ranks))
    several = min(_MOST_MICRO_BATCHES, max(2, run.train.batch_size // run.train.micro_batch_size))
    larger = max(run.train.batch_size, several * run.train.micro_batch_size)
    timed = replace(run, train=replace(run.train, batch_size=larger))
    needs = estimate(timed, compute_dtype(run), int(batch_sizes(run.train).sum()), device)
    if refusal := memory_refusal(run, needs, free_memory(device)):
        raise ConfigError(f"gpu is {device.type!r}, where this run cannot be timed: {refusal}")
    state = build_state(run, ranks)
    return LocalPlan(run, _device_name(device), needs, *_timings(state, run, several, ranks))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def _timings(state: TrainState, run: Run, several: int, ranks: Ranks) -> tuple[Timing, Timing]:
    """Steps of one and of `several` micro-batches in turn, so that drift of the machine affects both."""
    sizes, device = (1, several), ranks.device
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    peaks = {}
    for size in sizes:  # first steps; a CPU's peak memory only grows, so that of one micro-batch is read in between
        _step_seconds(state, run, size, ranks)
        peaks[size] = peak_memory(device)
    for _ in range(TIMED_STEPS):
        for size in sizes:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # compiling needed memory that these steps do not
            seconds[size].append(_step_seconds(state, run, size, ranks))
            if device.type == "cuda" or size == several:
                peaks[size] = peak_memory(device)
    one, larger = (Timing(size, tuple(seconds[size]), peaks[size]) for size in sizes)
    return one, larger


def _step_seconds(state: TrainState, run: Run, micro_batches: int, ranks: Ranks) -> float:
    batches = _random_batches(run, micro_batches, state.step, ranks.device)
    _synchronize(ranks.device)
    began = time.perf_counter()
    pretrain_step(state, batches, micro_batches * run.train.micro_batch_size, run, ranks)
    _synchronize(ranks.device)
    return time.perf_counter() - began


def _random_batches(run: Run, micro_batches: int, seed: int, device: torch.device) -> list[Batch]:
    """Random tokens: the cost of a step does not depend on which, but for how evenly routers spread them."""
    modules = run.model.num_nextn_predict_layers
    shape = (run.train.micro_batch_size, run.train.sequence_length + 1 + modules)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(run.model.vocab_size, shape, generator=generator) for _ in range(micro_batches)]
    return [next_token_batch(tokens_BW.to(device), modules) for tokens_BW in drawn]


def peak_memory(device: torch.device) -> int:
    """Bytes: on a CPU the most this process has held so far, on a GPU the most its tensors took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------------------- output


def local_json(plan: LocalPlan) -> dict[str, Any]:
    """Everything, in bytes, seconds and FLOP/s."""
    return {
        "device": plan.device,
        "compute_dtype": plan.run.train.compute_dtype,
        "parameters": asdict(plan.run.model.parameter_counts()),
        "timed": [asdict(timing) for timing in (plan.one, plan.several)],
        "step": {
            "micro_batches": plan.micro_batches,
            "tokens": plan.tokens_per_step,
            "seconds": plan.seconds_per_step,
            "extrapolated": plan.extrapolated,
        },
        "memory": {"peak": plan.peak_memory, "estimated": plan.needs.memory},
        "tokens_per_second": plan.tokens_per_second,
        "flops_per_second": plan.flops_per_second,
        "run": {"steps": plan.run.train.steps, "tokens": plan.needs.tokens, "seconds": plan.run_seconds},
    }


def show_local(console: Console, plan: LocalPlan) -> None:
    """What was measured, then what follows from it."""
    train = plan.run.train
    timed = Table("micro-batches of a step", "tokens", "seconds", "peak GiB", title_justify="left")
    timed.title = f"Timed here ({plan.device}): {TIMED_STEPS} steps of each size"
    for timing in (plan.one, plan.several):
        tokens = timing.micro_batches * train.micro_batch_size * train.sequence_length
        seconds = f"{timing.median:.3f} ({min(timing.seconds):.3f} to {max(timing.seconds):.3f})"
        timed.add_row(str(timing.micro_batches), f"{tokens:,}", seconds, f"{timing.peak_memory / _GIB:.2f}")
    console.print(timed)
    how = "timed" if not plan.extrapolated else "extrapolated"
    whole = "the whole process" if plan.device.startswith("CPU") else "all tensors"
    rows = {
        "model": f"{_millions(plan)}M parameters, {plan.run.optimizer.name}, computing in {train.compute_dtype}",
        "step": f"{plan.seconds_per_step:.3f} s for {train.batch_size} x {train.sequence_length} tokens ({how})",
        "speed": f"{plan.tokens_per_second:,.0f} tokens/s, {plan.flops_per_second / 1e9:,.0f} GFLOP/s of model FLOPs",
        "memory": f"{plan.peak_memory / _GIB:.2f} GiB for {whole}, {plan.needs.memory / _GIB:.2f} estimated (tensors)",
        "run": f"{train.steps:,} steps, {plan.needs.tokens:,} tokens: {duration(plan.run_seconds)} without evaluations",
    }
    for name, text in rows.items():
        console.print(f"{name:8}{text}", highlight=False, soft_wrap=True)
    console.print("Weights and tokens were random; trained routers spread tokens more evenly.", highlight=False)


def _millions(plan: LocalPlan) -> str:
    counts = plan.run.model.parameter_counts()
    return f"{(counts.total + counts.mtp) / 1e6:.1f}"
