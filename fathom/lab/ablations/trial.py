"""One run of an ablation: train a variant with the training loop's own steps, measure it, return plain JSON.

The models are not saved: with another attention they are no DeepSeek-V3 checkpoint. Only the metrics are kept. A run is
short and starts again when interrupted; finished runs are kept (runner.py).
"""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer

import fathom.lab.ablations.measure as measure
from fathom.config import to_json
from fathom.data.tokenize import TokenizedCorpus, open_tokenized
from fathom.distributed.ranks import Ranks
from fathom.lab.ablations.prediction import ApartLoss
from fathom.lab.ablations.variants import Variant, build_model
from fathom.runtime.hardware import install_allocator
from fathom.train.errors import TrainingError
from fathom.train.loss import PretrainLoss
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.setup import compute_dtype, init_train_state, open_rows, resolve
from fathom.train.step import StepMetrics, TrainState

_CURVE_POINTS = 50
_LAST_SHARE = 0.1
"""Fraction of the run, at its end, over which the «last» metrics are averaged."""

Record = dict[str, Any]


def run_trial(variant: Variant, data: Path) -> Record:
    """Train and measure. Raises TrainingError if the loss does not stay finite."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
        install_allocator()
    ranks = Ranks(0, 1, device)
    prepared = open_tokenized(data)
    resolved = replace(variant, run=resolve(variant.run, prepared, ranks))
    state = init_train_state(build_model(resolved).to(device).train(), resolved.run, ranks)
    if not resolved.shared_ends:
        state.loss = ApartLoss(cast(PretrainLoss, state.loss))
    results, curve, timing = _train(state, resolved, prepared, ranks)
    found, timed = _measure(state, resolved, prepared, device)
    return {
        "variant": to_json(variant),
        "corpus": prepared.corpus_hash,
        "results": {**results, **found},
        "curve": curve,
        "timing": {**timing, **timed},
        "machine": machine(device),
    }


def machine(device: torch.device) -> dict[str, str]:
    """The hardware and software of a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def _train(
    state: TrainState, variant: Variant, prepared: TokenizedCorpus, ranks: Ranks
) -> tuple[measure.Metrics, dict[str, list[float]], measure.Metrics]:
    run, clock = variant.run, measure.clock_of(ranks.device)
    rows = open_rows(prepared, run, "train")
    size, steps = run.train.batch_size, run.train.steps
    history: list[StepMetrics] = []
    optimizing = _time_in(state.optimizers, clock)
    began, began_wall = clock(), time.perf_counter()
    while state.step < steps:
        batches = micro_batches(rows, state.step * size, size, run, ranks)
        history.append(pretrain_step(state, batches, size, run, ranks))
        if state.skipped_in_a_row >= run.train.max_bad_steps:
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
                f"{state.step} of {to_json(variant)}"
            )
    seconds, wall = clock() - began, time.perf_counter() - began_wall
    last = history[-max(1, round(_LAST_SHARE * steps)) :]
    results = {
        "last_loss": sum(metrics.loss for metrics in last) / len(last),
        "last_max_vio": sum(metrics.max_vio for metrics in last) / len(last),
        "skipped": float(state.skipped),
    }
    every = max(1, steps // _CURVE_POINTS)
    seen = [(step + 1, history[step]) for step in range(every - 1, steps, every)]
    curve = {
        "step": [float(step) for step, _ in seen],
        "loss": [metrics.loss for _, metrics in seen],
        "max_vio": [metrics.max_vio for _, metrics in seen],
    }
    timing = {
        "train_seconds": seconds,
        "seconds_per_step": seconds / steps,
        "optimizer_per_step": sum(optimizing) / steps,
        "busy": seconds / wall,
    }
    return results, curve, timing


def _time_in(optimizers: Sequence[Optimizer], clock: Callable[[], float]) -> list[float]:
    """Seconds of every optimizer step from now on; the list is filled as they run."""
    spent: list[float] = []
    for optimizer in optimizers:
        # Optimizers step one after another, so each pair of hooks adds one duration.
        optimizer.register_step_pre_hook(lambda *_: spent.append(-clock()))
        optimizer.register_step_post_hook(lambda *_: spent.append(clock()))
    return spent


def _measure(
    state: TrainState, variant: Variant, prepared: TokenizedCorpus, device: torch.device
) -> tuple[measure.Metrics, measure.Metrics]:
    run, model, clock = variant.run, state.model.eval(), measure.clock_of(device)
    rows = open_rows(prepared, run, "valid")
    held_out = measure.HeldOut(rows, prepared, run.train, compute_dtype(run))
    timing: measure.Metrics = {}
    with torch.compiler.set_stance("force_eager"):
        results = measure.quality(model, held_out)
        if "denial" in variant.measures:
            results |= measure.denial(model, held_out, results["bits_per_byte"])
        if "groups" in variant.measures:
            results |= measure.groups(model, held_out)
        if "drafting" in variant.measures:
            found, timed = measure.drafting(model, held_out, clock)
            results, timing = results | found, timing | timed
        if "cache" in variant.measures:
            found, timed = measure.cache(model, variant, clock)
            results, timing = results | found, timing | timed
    return results, timing
