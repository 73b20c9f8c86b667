"""Reinforcement learning with verifiable rewards: a script that reads top to bottom.

A round samples a group of answers to each of some problems, rewards them by rule, and takes one optimizer step (or
some) on the log-probabilities of what was sampled. One code samples and trains, on the same tensors: the trainer
replays the experts that the engine chose, and every round measures how far their log-probabilities are apart.

What is drawn is a function of (seed, round, problem, sample), so a run continues bit-exactly from its checkpoints.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console

from fathom.distributed.ranks import Ranks
from fathom.eval.acceptance import draft_acceptance
from fathom.model.transformer import Model
from fathom.posttrain.objective import k3
from fathom.posttrain.pack import PackedSamples
from fathom.posttrain.policy import PolicyObjective, scored, trained_samples
from fathom.posttrain.rl_config import RlRun
from fathom.posttrain.rollout import Rollout, rollouts
from fathom.posttrain.sampler import Sampler
from fathom.posttrain.session import Session, open_session, posttrain_step, start_loss
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.protocol import Task, problems
from fathom.train.errors import TrainingError

_ACCEPTANCE_PROMPTS, _ACCEPTANCE_TOKENS = 16, 32
"""Greedy continuations, with one draft a step, that a round's acceptance rate is measured on."""

_PARITY_BOUNDS = {torch.float32: 1e-7, torch.bfloat16: 1e-3}
"""Of the mean k3 between engine and trainer: where one token in 4,000 is off by 0.1 in float32, it is 1e-6."""


def rl(run: RlRun, directory: Path, ranks: Ranks, resume: bool = False, console: Console | None = None) -> bool:
    """Train `run` in `directory`; returns whether it finished (False: a signal stopped it, after saving).

    Raises ConfigError for a task that does not exist and what else is wrong with the run, TrainingError where engine
    and trainer differ by more than the bound or the loss stays infinite, TaskError for a reward that cannot be used.
    """
    exercise = task(run.rl.task)
    with open_session(
        run, directory, ranks, resume, console, detach_mtp=True, temperature=run.rl.temperature
    ) as session:
        config, state = session.run.rl, session.state
        sampler = Sampler(session, config.problems * config.group_size, config.speculative)
        start = start_loss(session) if config.kl_weight else None
        stream = problems(exercise, "train", start=state.step // config.updates * config.problems)
        while not session.done:
            # Sample: every rank answers some of the round's problems, and all get all answers.
            began, seed = time.perf_counter(), f"{session.run.train.seed}/{state.step}"
            own = list(islice(stream, config.problems))[ranks.rank :: ranks.world]
            answered = rollouts(
                sampler.engine, exercise, own, config.group_size, config.params(), seed=seed, for_training=True
            )
            groups = [group for each in ranks.gather(answered) for group in each]
            metrics = _rollout_metrics(groups, time.perf_counter() - began)
            if session.state.model.mtp:
                metrics["mtp_acceptance"] = mtp_acceptance(sampler.engine.model, groups)

            # Train: one step, or some, each on a part of the answers.
            began, samples, dropped = time.perf_counter(), *trained_samples(groups, config)
            metrics["dropped_groups"] = dropped
            parts = [samples[part :: config.updates] for part in range(config.updates)]
            batches = [session.pack(part[ranks.rank :: ranks.world]) for part in parts]
            if min(map(len, parts)) < ranks.world:
                session.progress.print(f"step {state.step + 1}: too few groups with different rewards to learn from")
                session.passed(config.updates, metrics)
            else:
                if config.updates > 1:
                    batches = [[scored(packed, "old", session.loss) for packed in part] for part in batches]
                if start is not None:
                    batches = [[scored(packed, "start", start) for packed in part] for part in batches]
                objectives = [PolicyObjective(config, part) for part in parts]
                for objective, part in zip(objectives, batches, strict=True):
                    step_metrics = posttrain_step(session, part, objective)
                metrics |= PolicyObjective.metrics(objectives, ranks)
                metrics["update_tokens_per_second"] = sum(map(len, samples)) / (time.perf_counter() - began)
                session.stepped(step_metrics, metrics)
                _check_parity(metrics, session)
                sampler.refresh()

            if session.due(session.run.train.eval_every):
                every = [packed for part in batches for packed in part]
                session.evaluated(_evaluation(session, sampler, exercise, every))
            if session.save_or_stop():
                return False
    return True


def _rollout_metrics(groups: Sequence[Sequence[Rollout]], seconds: float) -> dict[str, float]:
    every = [rollout for group in groups for rollout in group]
    tokens = sum(rollout.length for rollout in every)
    return {
        "reward": fmean(rollout.reward for rollout in every),
        "pass_rate": fmean(rollout.passed for rollout in every),
        "length": tokens / len(every),
        "stop_rate": fmean(rollout.finish_reason == "stop" for rollout in every),
        "rollout_tokens_per_second": tokens / seconds,
    }


def mtp_acceptance(model: Model, groups: Sequence[Sequence[Rollout]]) -> float:
    """Share of one draft a step that is accepted in greedy answers to some of the problems."""
    prompts = [group[0].prompt_ids for group in groups[:_ACCEPTANCE_PROMPTS]]
    return draft_acceptance(model, prompts, _ACCEPTANCE_TOKENS).acceptance


def _check_parity(metrics: dict[str, float], session: Session[RlRun]) -> None:
    """Raise TrainingError where the trainer does not give what the engine sampled from."""
    bound = session.run.rl.parity_bound or _PARITY_BOUNDS[session.loss.compute_dtype]
    if not metrics["kl_k3"] <= bound:
        raise TrainingError(
            f"step {session.state.step}: engine and trainer differ by a KL of {metrics['kl_k3']:.2g}, and by "
            f"{metrics['max_abs_dlogp']:.2g} in a log-probability; the bound of the KL is {bound:g}. Answers would be "
            "scored by another policy than gave them: leave --replay-routing and --keep-sampling-mask on, compute in "
            "float32, or raise --parity-bound knowingly"
        )


def _evaluation(
    session: Session[RlRun], sampler: Sampler, exercise: Task, batches: Sequence[PackedSamples]
) -> dict[str, float]:
    """On test problems, greedily; and how far the policy is from its start, on the round's answers."""
    config, values = session.run.rl, {}
    if config.eval_problems:
        ranks = session.ranks
        tested = list(problems(exercise, "test", count=config.eval_problems))[ranks.rank :: ranks.world]
        greedy = replace(config.params(), temperature=0.0)
        answered = rollouts(sampler.engine, exercise, tested, 1, greedy)
        every = [group[0] for each in ranks.gather(answered) for group in each]
        values["test_pass_rate"] = fmean(rollout.passed for rollout in every)
        values["test_length"] = fmean(rollout.length for rollout in every)
    values["kl_start"] = _kl_to_start(session, batches)
    return values


def _kl_to_start(session: Session[RlRun], batches: Sequence[PackedSamples]) -> float:
    """Mean k3 over the targets, between the model as it is now and as it was before the run."""
    start = start_loss(session)
    total_2 = torch.zeros(2, dtype=torch.float64, device=session.ranks.device)
    for packed in batches:
        difference_X = k3(session.loss.facts(packed).logprobs_X, start.facts(packed).logprobs_X)
        total_2 += torch.stack((difference_X.double().sum(), total_2.new_tensor(len(difference_X))))
    total, count = session.ranks.sum(total_2).tolist()
    return total / count if count else 0.0
