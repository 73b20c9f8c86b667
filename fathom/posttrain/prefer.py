"""Preference training (DPO, arXiv 2305.18290), from pairs of answers to checkpoints: a script that reads top to bottom.

The loss of a pair is −log σ(β·margin): the margin is by how much more the chosen answer's log-probability has risen
over the reference's than the rejected one's. The reference is the model that the run starts from; its log-probabilities
never change, so they are computed once, before the first step, and stored beside the run. Its derivative makes every
token of both answers worth ±β·σ(−β·margin), and the one loss of post-training does the rest.

MTP modules learn from both answers and change nothing but themselves.

Shapes: X targets of a micro-batch, R its samples, P = R / 2 its pairs.
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
from fathom.posttrain.loss import PosttrainLoss, TargetFacts
from fathom.posttrain.objective import dpo
from fathom.posttrain.pack import PackedSamples, Sample, Targets, micro_batches, pack
from fathom.posttrain.prefer_data import (
    Pair,
    PreferRun,
    held_out,
    load_reference,
    pairs_digest,
    read_pairs,
    save_reference,
)
from fathom.posttrain.session import Session, open_session, posttrain_step, start_loss
from fathom.posttrain.sft_data import shuffled

REFERENCE = "reference.safetensors"


def prefer(run: PreferRun, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    Raises ValueError, by file and line, for a pair that cannot be trained on; ConfigError where a resumed run's pairs
    or model have changed, and as `open_session` does; TrainingError where the loss stays infinite.
    """
    if not run.data.pairs:
        raise ConfigError("name the pairs to train on: --data FILE.jsonl")
    source, path = model_directory(run.init), Path(run.data.pairs)
    file = read_pairs(path, load_tokenizer(source), run.train.max_length, run.data.strict)
    trained = [index for index, pair in enumerate(file.pairs) if not held_out(pair, run.data.heldout)]
    tested = sorted({*range(len(file.pairs))} - {*trained})
    _check_batch(run, len(trained), ranks)
    steps = max(1, round(run.data.epochs * len(trained) / run.train.batch_samples))
    run = replace(run, train=replace(run.train, steps=run.train.steps or steps))

    with open_session(run, directory, ranks, resume, console, detach_mtp=True) as session:
        run, batch = session.run, session.run.train.batch_samples
        session.progress.print(
            f"data   {len(trained):,} pairs to train on, {len(tested):,} held out, {file.too_long:,} too long and left "
            f"out; {run.train.steps:,} steps of {batch:,} pairs"
        )
        pairs = with_reference(session, file.pairs, source, directory / REFERENCE)
        while not session.done:
            step, began = session.state.step, time.perf_counter()
            places = range(step * batch, (step + 1) * batch)
            chosen = [pairs[trained[index]] for index in shuffled(len(trained), places, run.train.seed)]
            objective = DpoObjective(run.beta, len(chosen))
            metrics = posttrain_step(session, pack_pairs(session, chosen[ranks.rank :: ranks.world]), objective)
            speed = sum(map(len, chosen)) / (time.perf_counter() - began)
            session.stepped(metrics, {**objective.metrics(ranks), "tokens_per_second": speed})
            if tested and session.due(run.train.eval_every):
                found = evaluate(session, [pairs[index] for index in tested])
                session.evaluated({f"val_{name}": value for name, value in found.items()})
            if session.save_or_stop():
                return False
    return True


class DpoObjective:
    """The objective of one step of `pairs` pairs over all ranks, and what it saw of them."""

    def __init__(self, beta: float, pairs: int) -> None:
        self._beta, self._pairs = beta, pairs
        self._sums: list[Tensor] = []

    def __call__(self, targets: Targets, facts: TargetFacts) -> Tensor:
        """c of the targets (X); the micro-batch's samples are chosen, rejected, chosen, …"""
        rises_R = targets.sums(facts.logprobs_X.double() - targets.values["reference"].double())
        chosen_P, rejected_P = rises_R.view(-1, 2).unbind(1)
        margins_P = chosen_P - rejected_P
        weights_P = dpo(margins_P, self._beta) / self._pairs
        losses_P = -torch.nn.functional.logsigmoid(self._beta * margins_P)
        rises = (self._beta * chosen_P, self._beta * rejected_P)
        self._sums.append(torch.stack([t.double().sum() for t in (losses_P, margins_P > 0, margins_P, *rises)]))
        c_R = torch.stack((weights_P, -weights_P), dim=1).flatten()
        return c_R[targets.sample_X].to(facts.logprobs_X.dtype)

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Means over the pairs of all ranks. A collective call."""
        nothing_5 = torch.zeros(5, dtype=torch.float64, device=ranks.device)
        means = ranks.sum(torch.stack([nothing_5, *self._sums]).sum(0)) / self._pairs
        names = ("dpo_loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
        return dict(zip(names, means.tolist(), strict=True))


def with_reference(session: Session[PreferRun], pairs: Sequence[Pair], source: Path, path: Path) -> list[Pair]:
    """The pairs with the reference's log-probabilities: read from `path`, or computed and written. A collective call.

    Raises ConfigError where those at `path` are of other pairs or another model.
    """
    digest = pairs_digest(pairs, source, session.loss.compute_dtype)
    if session.loop_state.setdefault("data", digest) != digest:
        raise ConfigError(f"{session.run.data.pairs} or {source} has changed since the run in {path.parent} started")
    ranks = session.ranks
    if ranks.gather(path.exists())[0]:
        logprobs = load_reference(path, pairs, digest)
    else:
        session.progress.print("computing the reference's log-probabilities, once")
        # Before the first step the trained model is the reference itself.
        loss = session.loss if session.state.step == 0 else start_loss(session)
        own = pair_logprobs(session, pairs[ranks.rank :: ranks.world], loss)
        every = ranks.gather([logprobs_X.cpu() for logprobs_X in own])
        logprobs = [every[index % ranks.world][index // ranks.world] for index in range(len(pairs))]
        if ranks.is_main:
            save_reference(path, logprobs, digest)
    return [_with_values(pair, logprobs_X) for pair, logprobs_X in zip(pairs, logprobs, strict=True)]


def pair_logprobs(session: Session[PreferRun], pairs: Sequence[Pair], loss: PosttrainLoss) -> list[Tensor]:
    """Of each pair the log-probabilities of its trained tokens, the chosen answer's first, float32."""
    found = []
    for packed in pack_pairs(session, pairs):
        logprobs_X = loss.facts(packed).logprobs_X.float()
        counts = packed.targets.sums(torch.ones_like(logprobs_X)).view(-1, 2).sum(1)
        found += logprobs_X.split([int(count) for count in counts.tolist()])
    return found


def _with_values(pair: Pair, logprobs_X: Tensor) -> Pair:
    """The pair with its reference log-probabilities in their tokens' places."""
    samples: list[Sample] = []
    for sample in pair:
        places_X = sample.weights_T.nonzero()[:, 0]
        reference_T = torch.zeros(len(sample)).index_copy(0, places_X, logprobs_X[: len(places_X)])
        logprobs_X = logprobs_X[len(places_X) :]
        samples.append(replace(sample, values={"reference": reference_T}))
    return Pair(*samples)


def pack_pairs(session: Session[PreferRun], pairs: Sequence[Pair]) -> list[PackedSamples]:
    """Micro-batches in which the answers of a pair stand one after the other."""
    parts = micro_batches(pairs, session.run.train.micro_batch_tokens)
    modules, absent_X = len(session.state.model.mtp), session.absent_X
    packed = [pack([sample for pair in part for sample in pair], modules, absent_X) for part in parts]
    return [each.to(session.ranks.device) for each in packed]


def evaluate(session: Session[PreferRun], pairs: Sequence[Pair]) -> dict[str, float]:
    """The same metrics of pairs that are not trained. A collective call."""
    objective, ranks = DpoObjective(session.run.beta, len(pairs)), session.ranks
    for packed in pack_pairs(session, pairs[ranks.rank :: ranks.world]):
        objective(packed.targets, session.loss.facts(packed))
    return objective.metrics(ranks)


def _check_batch(run: PreferRun, pairs: int, ranks: Ranks) -> None:
    batch = run.train.batch_samples
    if not ranks.world <= batch <= pairs:
        raise ConfigError(
            f"train.batch_samples is {batch}; it must be from {ranks.world}, a pair a rank, to all {pairs} pairs"
        )
