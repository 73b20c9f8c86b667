"""Distillation from a teacher's whole distribution: a script that reads top to bottom.

At every token of the assistant's, end of turn included, the student's distribution of the next token is brought nearer
to the teacher's, by the divergence that `beta` chooses (fathom/ops/loss/reference.py; GKD, arXiv 2306.13649). A token
is one target to fine-tuning and as many as the vocabulary has to this.

With `on_policy` the student answers the prompts itself (distill_on_policy.py).

MTP modules learn from the text itself and change nothing but themselves.

Shapes: X targets of a micro-batch, D the student's hidden, U the teacher's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor

from fathom.checkpoint.digests import digest_of
from fathom.checkpoint.hf.model import load_config, load_model, model_directory
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.model.outputs import HiddenStates
from fathom.model.transformer import Model
from fathom.ops.loss.distillation import linear_distillation
from fathom.posttrain.distill_config import DistillRun
from fathom.posttrain.distill_on_policy import distill_on_policy
from fathom.posttrain.loss import PosttrainLoss
from fathom.posttrain.pack import PackedSamples, Sample
from fathom.posttrain.session import Session, compute_dtype, open_session, posttrain_step
from fathom.posttrain.sft_data import open_text, read_samples, trained_tokens


def distill(
    run: DistillRun, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None
) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    Raises ValueError, by file and line, for a conversation that cannot be trained on; ConfigError for a teacher with
    another vocabulary, and as `open_session` does; TrainingError where the loss stays infinite.
    """
    source = model_directory(run.init)
    teacher_source = _teacher_directory(run, source)
    data = read_samples(run, load_tokenizer(source))
    steps = data.steps(run.data.epochs, run.train.batch_samples)
    run = replace(run, train=replace(run.train, steps=run.train.steps or steps))
    _check_lengths(run, teacher_source, ranks)

    # What the student samples is trained by weights of its tokens, as in reinforcement learning.
    loss_type = PosttrainLoss if run.on_policy else DistillLoss
    with open_session(
        run, directory, ranks, resume, console, detach_mtp=True, temperature=run.temperature, loss_type=loss_type
    ) as session:
        run = session.run
        _check_unchanged(session, data.digest, teacher_source)
        teacher = load_teacher(teacher_source, run, ranks)
        vocab_size, text = session.state.model.config.vocab_size, None
        if run.data.pretrain_share:
            text = open_text(run, source, vocab_size, directory / "data", ranks)
        session.progress.print(
            f"data   {len(data.trained):,} samples, {len(data.held_out):,} held out, {data.file.too_long:,} too long "
            f"and left out; {run.train.steps:,} steps of {run.train.batch_samples:,} samples"
        )
        if run.on_policy:
            return distill_on_policy(session, data, teacher)
        while not session.done:
            step, began = session.state.step, time.perf_counter()
            samples = data.batch(step, run.train.batch_samples, run.train.seed)
            if text is not None:
                samples += text.samples(step, trained_tokens(samples))
            objective = Distillation(teacher, run.beta, trained_tokens(samples))
            metrics = posttrain_step(session, session.pack(samples[ranks.rank :: ranks.world]), objective)
            tokens = sum(map(len, samples))
            speed = tokens / (time.perf_counter() - began)
            session.stepped(metrics, {"tokens_per_second": speed, "trained_tokens": trained_tokens(samples)})
            if data.held_out and session.due(run.train.eval_every):
                session.evaluated({"val_divergence": held_out_divergence(session, objective, data.held_out)})
            if session.save_or_stop():
                return False
    return True


@dataclass(frozen=True, eq=False)
class Distillation:
    """The objective of one step, which `DistillLoss` computes."""

    teacher: Model
    beta: float
    trained: float
    """The sum of the weights of the step's targets."""


class DistillLoss(PosttrainLoss):
    """The loss of post-training with a divergence from the teacher in place of weighted log-probabilities."""

    def _main_loss(self, packed: PackedSamples, hidden: HiddenStates, objective: Distillation) -> tuple[Tensor, Tensor]:
        """The mean divergence over the step's targets; and this micro-batch's part of the sum, detached."""
        divergence = (packed.targets.weights_X * self._divergences(packed, hidden, objective)).sum()
        return divergence / objective.trained, divergence.detach()

    @torch.no_grad()
    def divergences(self, packed: PackedSamples, objective: Distillation) -> Tensor:
        """Of the targets (X), in nats."""
        return self._divergences(packed, self._hidden(packed, mtp=False), objective)

    def _divergences(self, packed: PackedSamples, hidden: HiddenStates, objective: Distillation) -> Tensor:
        head_OD, teacher = self.model.lm_head.weight, objective.teacher
        h_XD = hidden.h_BSD.flatten(0, 1)[packed.index_X].to(head_OD.dtype)
        with torch.no_grad():
            inputs, cu_seqlens = packed.batch.inputs, packed.batch.cu_seqlens
            states = teacher.forward_hidden(inputs, cu_seqlens=cu_seqlens, compute_dtype=self.compute_dtype)
            teacher_h_XU = states.h_BSD.flatten(0, 1)[packed.index_X].to(teacher.lm_head.weight.dtype)
        return linear_distillation(
            h_XD, head_OD, teacher_h_XU, teacher.lm_head.weight, objective.beta, self.temperature
        )


def held_out_divergence(session: Session[DistillRun], objective: Distillation, samples: Sequence[Sample]) -> float:
    """The mean divergence over the targets of samples that are not trained. A collective call."""
    ranks, loss = session.ranks, cast(DistillLoss, session.loss)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for packed in session.pack(samples[ranks.rank :: ranks.world]):
        divergences_X = loss.divergences(packed, objective)
        total += (packed.targets.weights_X * divergences_X).sum(dtype=torch.float64)
    return float(ranks.sum(total)) / trained_tokens(samples)


def load_teacher(source: Path, run: DistillRun, ranks: Ranks) -> Model:
    """The teacher: on a GPU in the activations' type; a CPU's kernels round float32 weights themselves."""
    dtype = compute_dtype(run) if ranks.device.type == "cuda" else torch.float32
    return load_model(source, dtype, ranks.device).requires_grad_(False)


def _teacher_directory(run: DistillRun, student: Path) -> Path:
    """Where the teacher is. Raises ConfigError for one whose token ids mean anything else than the student's."""
    if not run.teacher:
        raise ConfigError("name the model to learn from: --teacher MODEL")
    teacher = model_directory(run.teacher)
    sizes = [load_config(source).vocab_size for source in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"teacher {run.teacher} has a vocabulary of {sizes[1]} ids, the student {run.init} one of {sizes[0]}; they "
            "must be the same"
        )
    if load_tokenizer(student).tokenizer_json != load_tokenizer(teacher).tokenizer_json:
        raise ConfigError(f"teacher {run.teacher} has another tokenizer than the student {run.init}: ids differ")
    return teacher


def _check_lengths(run: DistillRun, teacher: Path, ranks: Ranks) -> None:
    """Raise ConfigError for samples longer than the teacher can read, or fewer a step than there are ranks."""
    longest = load_config(teacher).max_position_embeddings
    if run.train.max_length > longest:
        raise ConfigError(f"train.max_length is {run.train.max_length}; teacher {run.teacher} takes {longest} tokens")
    if run.train.batch_samples < ranks.world:
        raise ConfigError(f"train.batch_samples is {run.train.batch_samples}; there are {ranks.world} ranks")


def _check_unchanged(session: Session[DistillRun], data: str, teacher: Path) -> None:
    """Raise ConfigError where a resumed run would go on with other conversations or another teacher."""
    weights = digest_of(teacher / "config.json", *sorted(teacher.glob("*.safetensors")))
    for name, digest, what in (("data", data, session.run.data.chats), ("teacher", weights, session.run.teacher)):
        if session.loop_state.setdefault(name, digest) != digest:
            raise ConfigError(f"{what} has changed since {session.directory} was trained with it")
