"""Distillation on the student's own answers: it is corrected where it goes, not where the data goes (GKD, arXiv
2306.13649).

The student samples an answer to each prompt of a step. The gradient of KL(student‖teacher) at a sampled token is
−(log T − log S)·∇log S, so a token is worth log T − log S, less the mean: its advantage, as reinforcement learning has
it. The same code samples and trains as there, and the trainer replays the experts that the engine chose.

Shapes: X targets of a micro-batch, T tokens of a sample.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import xxhash
from torch import Tensor

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.transformer import Model
from fathom.posttrain.distill_config import DistillRun
from fathom.posttrain.loss import PosttrainLoss, TargetFacts
from fathom.posttrain.pack import PackedSamples, Sample, Targets
from fathom.posttrain.sampler import Sampler
from fathom.posttrain.session import Session, posttrain_step
from fathom.posttrain.sft_data import SftSamples, trained_tokens


def distill_on_policy(session: Session[DistillRun], data: SftSamples, teacher: Model) -> bool:
    """The loop of an open run; returns whether it finished."""
    run, ranks, loss = session.run, session.ranks, session.loss
    teacher_loss = PosttrainLoss(teacher, loss.compute_dtype, temperature=run.temperature)
    sampler = Sampler(session, -(-run.train.batch_samples // ranks.world), speculative=True)
    while not session.done:
        step, began = session.state.step, time.perf_counter()
        prompts = [prompt_ids(sample) for sample in data.batch(step, run.train.batch_samples, run.train.seed)]
        own = answers(sampler.engine, prompts[ranks.rank :: ranks.world], run, f"{run.train.seed}/{step}/{ranks.rank}")
        every = [sample for each in ranks.gather(own) for sample in each]
        sampled, began_update = time.perf_counter() - began, time.perf_counter()

        batches = [with_teacher(packed, teacher_loss) for packed in session.pack(own)]
        tokens = trained_tokens(every)
        objective = ReverseKl(tokens, ranks.sum(sum_of_differences(batches, ranks.device)).item() / tokens)
        metrics = posttrain_step(session, batches, objective)
        sampler.refresh()
        values = {
            "reverse_kl": objective.mean(session),
            "length": tokens / len(every),
            "rollout_tokens_per_second": tokens / sampled,
            "update_tokens_per_second": sum(map(len, every)) / (time.perf_counter() - began_update),
        }
        session.stepped(metrics, values)
        if data.held_out and session.due(run.train.eval_every):
            session.evaluated({"val_reverse_kl": _held_out(session, sampler.engine, data.held_out, teacher_loss)})
        if session.save_or_stop():
            return False
    return True


class ReverseKl:
    """The objective of one step of `tokens` sampled tokens over all ranks, and what it saw of them.

    `baseline`, the mean of log T − log S over the step, leaves the expected gradient as it is, and takes out of it that
    whatever was sampled would else become less likely: on average log T is below log S.
    """

    def __init__(self, tokens: float, baseline: float = 0.0) -> None:
        self._tokens, self._baseline = tokens, baseline
        self._sums: list[Tensor] = []

    def __call__(self, targets: Targets, facts: TargetFacts) -> Tensor:
        """c of the targets (X): (log T − log S − baseline) / tokens."""
        difference_X = targets.values["teacher"] - facts.logprobs_X
        self._sums.append(-difference_X.sum(dtype=torch.float64))
        return (difference_X - self._baseline) / self._tokens

    def mean(self, session: Session[DistillRun]) -> float:
        """The estimate of KL(student‖teacher), in nats a token. A collective call."""
        nothing = torch.zeros((), dtype=torch.float64, device=session.ranks.device)
        return float(session.ranks.sum(torch.stack([nothing, *self._sums]).sum())) / self._tokens


def prompt_ids(sample: Sample) -> list[int]:
    """What comes before the first token that fine-tuning would train."""
    first = int((sample.weights_T != 0).nonzero()[0])
    return sample.tokens_T[: max(1, first)].tolist()


def answers(engine: Engine, prompts: Sequence[list[int]], run: DistillRun, seed: str) -> list[Sample]:
    """An answer to each prompt, sampled at the run's temperature, with the experts that its tokens took.

    Raises RuntimeError where no token could be sampled.
    """
    records = engine.model.config.num_moe_layers > 0
    handles = []
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=run.temperature,
            max_tokens=min(run.max_tokens, run.train.max_length - len(prompt)),
            seed=xxhash.xxh3_64_intdigest(seed.encode()),
        )
        handles.append(
            engine.submit(
                Request(prompt, params, stream=number, return_routed_experts=records, return_distributions=True)
            )
        )
    while engine.has_work:
        engine.step()
    samples = []
    for prompt, handle in zip(prompts, handles, strict=True):
        if handle.finish_reason == "error":
            raise RuntimeError(f"the student could not answer: {handle.error}")
        weights_T = torch.tensor([0.0] * len(prompt) + [1.0] * len(handle.token_ids))
        tokens_T = torch.tensor([*prompt, *handle.token_ids])
        engine_T = torch.tensor([0.0] * len(prompt) + [each.logprob for each in handle.sampled_from or ()])
        samples.append(Sample(tokens_T, weights_T, {"engine": engine_T}, handle.routed_experts))
    return samples


def with_teacher(packed: PackedSamples, teacher_loss: PosttrainLoss) -> PackedSamples:
    """The micro-batch with the teacher's log-probabilities among its targets' values; it routes by itself."""
    logprobs_X = teacher_loss.facts(replace(packed, topk_ids_LBSK=None)).logprobs_X
    values = {**packed.targets.values, "teacher": logprobs_X}
    return replace(packed, targets=replace(packed.targets, values=values))


def sum_of_differences(batches: Sequence[PackedSamples], device: torch.device) -> Tensor:
    """Σ log T − log S over the targets, with the engine's log S, which it sampled from (scalar, float64)."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for packed in batches:
        total += (packed.targets.values["teacher"] - packed.targets.values["engine"]).sum(dtype=torch.float64)
    return total


def _held_out(
    session: Session[DistillRun], engine: Engine, samples: Sequence[Sample], teacher_loss: PosttrainLoss
) -> float:
    """KL(student‖teacher) over answers to prompts that are not trained, the same draws each time. A collective call."""
    run, ranks = session.run, session.ranks
    prompts = [prompt_ids(sample) for sample in samples[ranks.rank :: ranks.world]]
    own = answers(engine, prompts, run, f"{run.train.seed}/held out/{ranks.rank}")
    objective = ReverseKl(sum(ranks.gather(trained_tokens(own))))
    for packed in session.pack(own):
        objective(with_teacher(packed, teacher_loss).targets, session.loss.facts(packed))
    return objective.mean(session)
