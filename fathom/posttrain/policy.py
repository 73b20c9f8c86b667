"""From rollouts to weights of tokens: which answers are trained, and their objective with its statistics.

Shapes: X targets of a micro-batch, T tokens of a sample, G answers of a group.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fathom.distributed.ranks import Ranks
from fathom.posttrain.loss import PosttrainLoss, TargetFacts
from fathom.posttrain.objective import PolicyWeights, advantages, cispo, grpo, gspo, k3, overlong_penalty, unbiased_kl
from fathom.posttrain.pack import PackedSamples, Sample, Targets
from fathom.posttrain.rl_config import RlConfig
from fathom.posttrain.rollout import Rollout


def trained_samples(groups: Sequence[Sequence[Rollout]], config: RlConfig) -> tuple[list[Sample], int]:
    """The answers that teach something, in the groups' order, and how many groups were dropped.

    A group is dropped where all rewards are equal, or where the mask of overlong answers leaves fewer than two.
    """
    samples, dropped = [], 0
    for group in groups:
        kept = [each for each in group if config.overlong == "penalise" or each.finish_reason != "length"]
        own = advantages([_reward(each, config) for each in kept]) if len(kept) > 1 else None
        if own is None:
            dropped += 1
            continue
        samples += [_sample(rollout, advantage, config) for rollout, advantage in zip(kept, own, strict=True)]
    return samples, dropped


def _reward(rollout: Rollout, config: RlConfig) -> float:
    if config.overlong == "mask":
        return rollout.reward
    return rollout.reward + overlong_penalty(rollout.length, config.max_tokens, config.overlong_cushion)


def _sample(rollout: Rollout, advantage: float, config: RlConfig) -> Sample:
    prompt = len(rollout.prompt_ids)
    weights_T = torch.tensor([0.0] * prompt + [float(own) for own in rollout.sampled])
    return Sample(
        torch.tensor(rollout.tokens),
        weights_T,
        {"advantage": weights_T * advantage, "engine": torch.tensor([0.0] * prompt + rollout.logprobs)},
        rollout.topk_ids_LTK if config.replay_routing else None,
        [None] * prompt + rollout.kept_ids if config.keep_sampling_mask else None,
    )


def scored(packed: PackedSamples, name: str, loss: PosttrainLoss) -> PackedSamples:
    """The micro-batch with the log-probabilities by a model among its targets' values."""
    values = {**packed.targets.values, name: loss.facts(packed).logprobs_X}
    return replace(packed, targets=replace(packed.targets, values=values))


class PolicyObjective:
    """The objective of one optimizer step, and what it saw of its targets.

    π_old is the trainer's own, before the round's first update, and not the engine's: what differs between the two, by
    rounding, is measured and bounded, and takes no part in the ratios.
    """

    def __init__(self, config: RlConfig, samples: Sequence[Sample]) -> None:
        """`samples` are the step's, of all ranks: every token counts alike."""
        self._config = config
        self._tokens = sum(float(sample.weights_T.sum()) for sample in samples)
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []

    def __call__(self, targets: Targets, facts: TargetFacts) -> Tensor:
        """c of the targets (X)."""
        now_X, old_X = facts.logprobs_X, targets.values.get("old", facts.logprobs_X)
        weights = self._weights(now_X, old_X, targets)
        c_X = weights.c_X
        start_X = targets.values.get("start")
        if start_X is not None:
            c_X = c_X + self._config.kl_weight * unbiased_kl(now_X, old_X, start_X)
        engine_X = targets.values["engine"]
        none_X = torch.zeros_like(now_X)
        columns = {
            "tokens": torch.ones_like(now_X),
            "entropy": facts.entropies_X,
            "kl_k3": k3(engine_X, old_X),
            "route_mismatch": none_X if facts.rerouted_X is None else facts.rerouted_X,
            "clip_share": weights.clipped_X,
            "kl_start": none_X if start_X is None else k3(now_X, start_X),
        }
        self._names = list(columns)
        self._sums.append(torch.stack([column_X.double().sum() for column_X in columns.values()]))
        self._largest.append((engine_X - old_X).abs().max())
        return c_X / self._tokens

    def _weights(self, now_X: Tensor, old_X: Tensor, targets: Targets) -> PolicyWeights:
        config, advantages_X = self._config, targets.values["advantage"]
        if config.variant == "cispo":
            return cispo(now_X, old_X, advantages_X, config.cap)
        if config.variant == "grpo":
            return grpo(now_X, old_X, advantages_X, config.clip_low, config.clip_high)
        return gspo(now_X, old_X, advantages_X, targets, config.clip_low, config.clip_high)

    @staticmethod
    def metrics(objectives: Sequence["PolicyObjective"], ranks: Ranks) -> dict[str, float]:
        """Means over all targets of a round, and the largest difference between engine and trainer."""
        first = objectives[0]
        total = ranks.sum(torch.stack([each for objective in objectives for each in objective._sums]).sum(0))
        largest = [float(each) for objective in objectives for each in objective._largest]
        sums = dict(zip(first._names, total.tolist(), strict=True))
        tokens = sums.pop("tokens")
        if not first._config.kl_weight:
            del sums["kl_start"]
        if not first._config.replay_routing:
            del sums["route_mismatch"]
        return {name: value / tokens for name, value in sums.items()} | {
            "max_abs_dlogp": max(ranks.gather(max(largest)))
        }
