"""The training loop: accumulate, clip, step, balance, log; evaluation and saving are visible calls.

Data order, schedules and initial weights are functions of (seed, step), so a run continues bit-exactly from any of its
checkpoints. Nothing is drawn at random inside the loop.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fathom.checkpoint.training_state import checkpoints, save_checkpoint
from fathom.config import ConfigError, load_json, save_json
from fathom.data.batch import Batch
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.metrics import MetricsLog
from fathom.ops import cpu
from fathom.runtime.hardware import free_memory, keep_freed_memory, matmul_flops, missing_for_compile
from fathom.train.estimate import estimate, memory_refusal
from fathom.train.evaluation import EvalResult, Validation, save_evaluation
from fathom.train.progress import Progress, duration
from fathom.train.run import Run
from fathom.train.schedule import batch_sizes, hyperparameters
from fathom.train.setup import (
    build_state,
    compute_dtype,
    prepare_data,
    resolve,
    restore_state,
    rows_of,
    with_initial_model,
)
from fathom.train.step import LossOutput, StepMetrics, TrainState, optimizer_step

_LOAD_RECORDS = 100
"""Expert loads are recorded about this many times in a run."""


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says why and what would help."""


def train(run: Run, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    Raises TrainingError where memory will not do or the loss stays infinite, and ConfigError for a directory that
    holds another run.
    """
    no_arena = keep_freed_memory()
    run = _open_directory(run, directory, ranks, resume)
    prepared = prepare_data(run, directory / "data", ranks)
    run = run if resume else resolve(run, prepared, ranks)
    sizes = batch_sizes(run.train)
    console = console or Console()
    peak = matmul_flops(compute_dtype(run), ranks.device) * ranks.world
    with Progress(console, run.train.steps, visible=ranks.is_main) as progress:
        _announce(run, prepared, int(sizes.sum()), peak, no_arena, ranks, progress)
        if ranks.is_main:
            save_json(run, directory / "run.json")
        found = checkpoints(directory) if resume else []
        state = restore_state(run, found[-1], ranks) if found else build_state(run, ranks)
        if found:
            progress.say(f"resuming after step {state.step} ({found[-1]})")
        return _loop(run, state, prepared, sizes, peak, directory, ranks, progress)


def _loop(
    run: Run,
    state: TrainState,
    prepared: TokenizedCorpus,
    sizes: np.ndarray,
    peak: float,
    directory: Path,
    ranks: Ranks,
    progress: Progress,
) -> bool:
    rows = rows_of(prepared, run, "train")
    validation = Validation(run, prepared, ranks)
    log = RunLog(directory, run, state.step) if ranks.is_main else None
    starts = np.concatenate(([0], np.cumsum(sizes)))
    flops = run.model.flops_per_token(run.train.sequence_length, mtp=True)
    with stop_signals() as stop_asked:
        while state.step < run.train.steps:
            began = time.perf_counter()
            step = state.step
            batches = micro_batches(rows, int(starts[step]), int(sizes[step]), run, ranks)
            facts = pretrain_step(state, batches, int(sizes[step]), run, ranks)
            speed = int(sizes[step]) * run.train.sequence_length / (time.perf_counter() - began)
            values = _metrics(facts, run, step, speed, speed * flops / peak)
            if log is not None:
                log.stepped(state.step, values, facts.tokens_per_expert_LE)
            progress.stepped(state.step, values)
            _check_finite(state, run, directory, progress)

            done = state.step == run.train.steps
            if done or _due(state.step, run.train.eval_every):
                sequences = run.train.final_eval_sequences if done else run.train.eval_sequences
                result = validation.evaluate(state.model, sequences)
                progress.evaluated(state.step, result.metrics())
                if log is not None:
                    log.evaluated(state.step, result)
            stopping = ranks.any(stop_asked())
            # A run of bad steps must not push the last good checkpoint out.
            save = done or stopping or _due(state.step, run.train.save_every)
            if save and ranks.is_main and not state.skipped_in_a_row:
                saved = _save(directory, run, state, prepared)
                progress.say(f"saved {saved}")
            ranks.barrier()
            if stopping and not done:
                progress.say("stopped by a signal; continue with --resume")
                return False
    return True


def pretrain_step(state: TrainState, batches: list[Batch], sequences: int, run: Run, ranks: Ranks) -> StepMetrics:
    """One optimizer step over `sequences` sequences, of which `batches` are this rank's micro-batches."""
    hyper = hyperparameters(run, state.step)
    weights_H = ranks.sum(torch.stack([batch.target_weights() for batch in batches]).sum(0))

    def loss(batch: Batch) -> LossOutput:
        fraction = batch.tokens_BT.shape[0] / sequences
        output: LossOutput = state.loss(batch, weights_H, hyper.mtp_loss_weight, fraction)
        return output

    return optimizer_step(state, batches, loss, weights_H, hyper, ranks)


def micro_batches(rows: TokenRows, first: int, sequences: int, run: Run, ranks: Ranks) -> list[Batch]:
    """This rank's contiguous share of the step's rows, in micro-batches."""
    if sequences % ranks.world:
        raise ConfigError(f"train.batch_size is {sequences}; it must be a multiple of the {ranks.world} ranks")
    share = sequences // ranks.world
    begin = first + ranks.rank * share
    size = min(run.train.micro_batch_size, share)
    starts = range(begin, begin + share, size)
    return [rows.shuffled(at, min(size, begin + share - at)).to(ranks.device) for at in starts]


def seconds_per_step(run: Run, directory: Path, ranks: Ranks, steps: int) -> float:
    """Median time of a step of a resolved run, from `steps` real ones on weights that are then thrown away."""
    prepared = prepare_data(run, directory / "data", ranks)
    state = build_state(run, ranks)
    rows = rows_of(prepared, run, "train")
    times = []
    for step in range(steps):
        began = time.perf_counter()
        batches = micro_batches(rows, step * run.train.batch_size, run.train.batch_size, run, ranks)
        pretrain_step(state, batches, run.train.batch_size, run, ranks)
        times.append(time.perf_counter() - began)
    return float(np.median(times[steps // 2 :]))


# ------------------------------------------------------------------------------------------------ around the loop


class RunLog:
    """metrics.jsonl and, a hundred times a run, every expert's load in loads.jsonl."""

    def __init__(self, directory: Path, run: Run, step: int) -> None:
        self._directory = directory
        self._metrics = MetricsLog(directory, tensorboard=run.train.tensorboard)
        self._metrics.truncate_after(step)
        self._loads = directory / "loads.jsonl"
        self._every = max(1, run.train.steps // _LOAD_RECORDS)
        kept = self._loads.read_text().splitlines() if step and self._loads.exists() else []
        self._loads.write_text("".join(line + "\n" for line in kept if json.loads(line)["step"] <= step))

    def stepped(self, step: int, values: dict[str, Any], tokens_per_expert_LE: Tensor) -> None:
        """Record a step; `step` counts from 1."""
        self._metrics.write(step, **values)
        if step == 1 or step % self._every == 0:
            with self._loads.open("a") as file:
                file.write(json.dumps({"step": step, "loads": tokens_per_expert_LE.tolist()}) + "\n")

    def evaluated(self, step: int, figures: EvalResult) -> None:
        """Record an evaluation."""
        self._metrics.write(step, **figures.metrics())
        save_evaluation(figures, step, self._directory)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a question the loop can ask; the second ends the process at once."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _open_directory(run: Run, directory: Path, ranks: Ranks, resume: bool) -> Run:
    """The run to train: what run.json holds when resuming, else `run` in a directory without one."""
    record = directory / "run.json"
    if resume:
        if not record.exists():
            raise ConfigError(f"{directory} holds no run to resume: {record} does not exist")
        return load_json(Run, record)
    if record.exists():
        raise ConfigError(f"{directory} already holds a run: continue it with --resume, or choose another --out")
    if ranks.is_main:
        directory.mkdir(parents=True, exist_ok=True)
    return with_initial_model(run)


def _announce(
    run: Run,
    prepared: TokenizedCorpus,
    sequences: int,
    peak: float,
    no_arena: str | None,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Say what is about to happen; refuse what cannot."""
    counts = run.model.parameter_counts()
    needs = estimate(run, compute_dtype(run), sequences, ranks.device)
    if refusal := memory_refusal(run, needs, free_memory(ranks.device)):
        raise TrainingError(refusal)
    progress.say(
        f"model  {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active per token"
        f" (+ {counts.mtp / 1e6:.1f}M in {run.model.num_nextn_predict_layers} MTP module(s))"
    )
    progress.say(
        f"data   {prepared.train_tokens:,} training tokens in {prepared.train_documents:,} documents, "
        f"{prepared.valid_tokens:,} held out; the run reads {needs.tokens:,}"
    )
    progress.say(
        f"needs  about {needs.memory / 2**30:.2f} GiB on each of {ranks.world} rank(s) and "
        f"{duration(needs.seconds(peak))}; computing in {run.train.compute_dtype}, {peak / 1e9:.0f} GFLOP/s at best"
    )
    lacking = missing_for_compile(ranks.device)
    if run.train.compile == "on" and lacking:
        raise TrainingError(f"train.compile is on, but {lacking}")
    if ranks.device.type == "cpu" and (why := cpu.missing()):
        progress.say(f"the CPU's kernels are missing, so plain torch does their work, more slowly: {why}")
    elif ranks.device.type == "cpu" and no_arena:
        progress.say(f"tensors have no arena, so holes between them take memory: {no_arena}")


def _metrics(facts: StepMetrics, run: Run, step: int, speed: float, mfu: float) -> dict[str, Any]:
    mtp = {} if facts.mtp_loss is None else {"mtp_loss": facts.mtp_loss}
    return {
        "loss": facts.loss,
        **mtp,
        "balance_loss": facts.balance_loss,
        "max_vio": facts.max_vio,
        "grad_norm": facts.grad_norm,
        "lr": hyperparameters(run, step).learning_rate,
        "tokens_per_second": speed,
        "mfu": mfu,
        "skipped": int(facts.skipped),
    }


def _check_finite(state: TrainState, run: Run, directory: Path, progress: Progress) -> None:
    """Say that a step was skipped; stop when too many were, in a row."""
    if not state.skipped_in_a_row:
        return
    progress.say(f"step {state.step}: loss or gradient is not finite; skipped ({state.skipped} so far)")
    if state.skipped_in_a_row >= run.train.max_bad_steps:
        good = checkpoints(directory)
        last = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint had been saved"
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
            f"{state.step}; {last}. Lower optimizer.learning-rate ({run.optimizer.learning_rate}) or lengthen "
            "schedule.warmup-steps"
        )


def _save(directory: Path, run: Run, state: TrainState, prepared: TokenizedCorpus) -> Path:
    saved = {
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    average = None if state.ema is None else state.ema.weights
    keep = run.train.keep_last
    return save_checkpoint(directory, state.step, state.model, prepared.tokenizer, saved, average, keep)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
