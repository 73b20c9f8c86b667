"""Pretraining, from data to checkpoints: a script that reads top to bottom.

Data order, schedules and initial weights are functions of (seed, step), so a run continues bit-exactly from any of its
checkpoints. Nothing is drawn at random inside the loop.
"""

import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.console import Console

from fathom.checkpoint.training_state import checkpoints, newest_whole_checkpoint, save_checkpoint
from fathom.config import ConfigError
from fathom.data.batch import Batch
from fathom.data.dataset import TokenRows
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.runtime.hardware import install_allocator, matmul_flops
from fathom.train.divergence import bad_steps, diverged, high_loss
from fathom.train.evaluation import Validation
from fathom.train.log import RunLog, step_values
from fathom.train.preflight import open_directory, preflight
from fathom.train.progress import Progress
from fathom.train.run import Run
from fathom.train.schedule import batch_sizes, hyperparameters
from fathom.train.setup import (
    build_state,
    compute_dtype,
    open_rows,
    reopen_corpus,
    resolve,
    restore_state,
    saved_optimizers,
    tokenize_once,
)
from fathom.train.signals import stop_signals
from fathom.train.step import LossOutput, StepMetrics, TrainState, optimizer_step


def train(run: Run, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    With `resume` the run in `directory` goes on; `run` may change what `fathom.train.resume.CHANGEABLE` names of it.

    Raises TrainingError where memory will not do or the run diverges, CheckpointError where no checkpoint is
    whole, ConfigError for a directory that holds another run, and ValueError for one that another process trains in.
    """
    arena_problem = install_allocator()
    with ExitStack() as stack:
        run = stack.enter_context(open_directory(run, directory, ranks, resume))

        # Data: tokenised once, cut into rows, as many of them in each step as the schedule gives.
        corpus = (reopen_corpus if resume else tokenize_once)(run, directory / "data", ranks)
        run = run if resume else resolve(run, corpus, ranks)
        rows, validation = open_rows(corpus, run, "train"), Validation(run, corpus, ranks)
        sizes = batch_sizes(run.train)
        peak_flops = matmul_flops(compute_dtype(run), ranks.device) * ranks.world
        flops_per_token = run.model.flops_per_token(run.train.sequence_length, mtp=True)
        progress = stack.enter_context(Progress(console or Console(), run.train.steps, visible=ranks.is_main))
        preflight(run, corpus, peak_flops, arena_problem, ranks, progress)

        # Model and optimizers: fresh, or as the newest whole checkpoint holds them.
        found = _checkpoint_to_resume(directory, ranks, progress) if resume else None
        state = restore_state(run, corpus, found, ranks) if found else build_state(run, ranks)
        if found:
            progress.print(f"resuming after step {state.step} ({found})")
        log = stack.enter_context(closing(RunLog(directory, run, state.step))) if ranks.is_main else None

        stop_requested = stack.enter_context(stop_signals())
        while state.step < run.train.steps:
            step, began = state.step, time.perf_counter()
            first, sequences = int(sizes[:step].sum()), int(sizes[step])
            batches = micro_batches(rows, first, sequences, run, ranks)
            metrics = pretrain_step(state, batches, sequences, run, ranks)

            speed = sequences * run.train.sequence_length / (time.perf_counter() - began)
            values = step_values(metrics, run, step, speed, mfu=speed * flops_per_token / peak_flops)
            if log is not None:
                log.stepped(state.step, values, metrics.tokens_per_expert_LE)
            progress.stepped(state.step, values)
            _end_diverged(state, metrics.loss, run, corpus, directory, ranks, progress)

            done = state.step == run.train.steps
            if done or _due(state.step, run.train.eval_every):
                limit = run.train.final_eval_sequences if done else run.train.eval_sequences
                result = validation.evaluate(state.model, limit)
                progress.evaluated(state.step, result.metrics())
                if log is not None:
                    log.evaluated(state.step, result)

            stopping = ranks.any(stop_requested())
            # A run of bad steps must not push the last good checkpoint out; whatever ends the run is saved.
            due = _due(state.step, run.train.save_every) and not (state.skipped_in_a_row or state.high_in_a_row)
            if done or stopping or due:
                progress.print(f"saved {save(directory, state, run, corpus, ranks)}")
            if stopping and not done:
                progress.print("stopped by a signal; continue with --resume")
                return False
    return True


def _checkpoint_to_resume(directory: Path, ranks: Ranks, progress: Progress) -> Path | None:
    """The newest whole checkpoint, which the main rank verifies; None where nothing was saved yet."""
    found = newest_whole_checkpoint(directory, progress.print) if ranks.is_main else None
    return ranks.gather(found)[0]


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
    """This rank's contiguous part of the step's rows, in micro-batches on its device."""
    if sequences % ranks.world:
        raise ConfigError(f"train.batch_size is {sequences}; it must be a multiple of the {ranks.world} ranks")
    own = sequences // ranks.world
    begin = first + ranks.rank * own
    size = min(run.train.micro_batch_size, own)
    starts = range(begin, begin + own, size)
    return [rows.shuffled(at, min(size, begin + own - at)).to(ranks.device) for at in starts]


def save(directory: Path, state: TrainState, run: Run, corpus: TokenizedCorpus, ranks: Ranks) -> Path:
    """Write a checkpoint. A collective call: all ranks hold the same, so the main one writes and the others wait."""
    if ranks.is_main:
        training_state = {**saved_optimizers(state), "corpus_hash": corpus.corpus_hash}
        ema = None if state.ema is None else state.ema.weights
        save_checkpoint(directory, state.step, state.model, corpus.tokenizer, training_state, ema, run.train.keep_last)
    ranks.barrier()
    return checkpoints(directory)[-1]


def _end_diverged(
    state: TrainState, loss: float, run: Run, corpus: TokenizedCorpus, directory: Path, ranks: Ranks, progress: Progress
) -> None:
    """After a step: raise TrainingError where the run has diverged. A model is left even where none had been saved."""
    reason = bad_steps(state, run.train.max_bad_steps, progress) or high_loss(state, loss)
    if reason is None:
        return
    if ranks.any(not checkpoints(directory)):
        save(directory, state, run, corpus, ranks)
    raise diverged(reason, run.optimizer.learning_rate, directory)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
