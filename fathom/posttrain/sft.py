"""Supervised fine-tuning, from conversations to checkpoints: a script that reads top to bottom.

The model learns to say what the assistant says in given conversations: the mean of −log p over the assistant's tokens,
end of turn included (DeepSeek-V3 report, section 5.1). Everything else in a conversation is read and not trained.

The samples of a step are a function of (seed, step), so a run continues bit-exactly from any of its checkpoints.

Shapes: X targets of a micro-batch.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from fathom.checkpoint.hf.model import model_directory
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.posttrain.loss import Objective, TargetFacts
from fathom.posttrain.pack import Sample, Targets
from fathom.posttrain.session import Session, open_session, posttrain_step
from fathom.posttrain.sft_config import SftRun
from fathom.posttrain.sft_data import SftSamples, open_text, read_samples, trained_tokens


def sft(run: SftRun, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    With `resume` the run in `directory` goes on; `run` may change what `posttrain.config.CHANGEABLE` names of it.

    Raises ValueError, by file and line, for a conversation that cannot be trained on; ConfigError for a directory that
    holds another run; CheckpointError where no checkpoint is whole; TrainingError where the loss stays infinite.
    """
    # Data: read anew by every process, before anything is written, and the length of the run with it.
    source = model_directory(run.init)
    data = read_samples(run, load_tokenizer(source))
    steps = data.steps(run.data.epochs, run.train.batch_samples)
    run = replace(run, train=replace(run.train, steps=run.train.steps or steps))
    if run.train.batch_samples < ranks.world:
        raise ConfigError(f"train.batch_samples is {run.train.batch_samples}; there are {ranks.world} ranks")

    with open_session(run, directory, ranks, resume, console, detach_mtp=False) as session:
        run = session.run
        _check_data(session, data)
        vocab_size, text = session.state.model.config.vocab_size, None
        if run.data.pretrain_share:
            text = open_text(run, source, vocab_size, directory / "data", ranks)
        for line in _description(run, data):
            session.progress.print(line)

        while not session.done:
            step, began = session.state.step, time.perf_counter()
            samples = data.batch(step, run.train.batch_samples, run.train.seed)
            if text is not None:
                samples += text.samples(step, trained_tokens(samples))
            own = samples[ranks.rank :: ranks.world]
            metrics = posttrain_step(session, session.pack(own), mean_loss(trained_tokens(samples)))

            tokens = sum(map(len, samples))
            speed = tokens / (time.perf_counter() - began)
            session.stepped(metrics, {"tokens_per_second": speed, "trained_tokens": trained_tokens(samples)})
            if data.held_out and session.due(run.train.eval_every):
                session.evaluated({"val_loss": held_out_loss(session, data.held_out)})
            if session.save_or_stop():
                return False
    return True


def mean_loss(trained: float) -> Objective:
    """The mean of −log p over the step's targets, of which `trained` is the sum of the weights: c = weight / sum."""

    def objective(targets: Targets, facts: TargetFacts) -> Tensor:
        return targets.weights_X / trained

    return objective


def held_out_loss(session: Session[SftRun], samples: Sequence[Sample]) -> float:
    """The mean of −log p over the targets of samples that are not trained. A collective call."""
    ranks = session.ranks
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for packed in session.pack(samples[ranks.rank :: ranks.world]):
        logprobs_X = session.loss.facts(packed).logprobs_X
        total -= (packed.targets.weights_X * logprobs_X).sum(dtype=torch.float64)
    return float(ranks.sum(total)) / trained_tokens(samples)


def _check_data(session: Session[SftRun], data: SftSamples) -> None:
    """Raise ConfigError where a resumed run would go on with other conversations."""
    before = session.loop_state.setdefault("data", data.digest)
    if before != data.digest:
        raise ConfigError(f"{session.run.data.chats} has changed since {session.directory} was trained on it")


def _description(run: SftRun, data: SftSamples) -> list[str]:
    trained, file = trained_tokens(data.trained), data.file
    tokens = sum(map(len, data.trained))
    lines = [
        f"data   {len(data.trained):,} samples of {tokens:,} tokens, {trained:,.0f} of them trained; "
        f"{len(data.held_out):,} samples held out; {run.train.steps:,} steps of {run.train.batch_samples:,} samples"
    ]
    if file.too_long:
        lines.append(
            f"       {file.too_long:,} samples have more than train.max_length ({run.train.max_length:,}) tokens and "
            f"are left out; the longest has {file.longest:,}"
        )
    return lines
