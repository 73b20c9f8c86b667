"""The one loss of post-training: Σ cₜ·(−log pₜ) over the targets, beside the MTP losses and the balance loss.

An objective gives cₜ, detached, once the log-probabilities are known. As in pretraining everything is a SUM over a
global normaliser, so micro-batches and ranks of any size add up to the gradient of one big batch.

Shapes: S inputs of a micro-batch, X targets, H = 1 + M heads, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fathom.model.outputs import HiddenStates
from fathom.model.transformer import Model
from fathom.ops.loss import linear_logprobs
from fathom.posttrain.pack import PackedSamples, Targets
from fathom.train.step import LossOutput, weighted_means


@dataclass(frozen=True, eq=False)
class TargetFacts:
    """What the trained model says of a micro-batch's targets, all detached."""

    logprobs_X: Tensor
    """At the sampling temperature, over the ids that were kept."""
    entropies_X: Tensor
    rerouted_X: Tensor | None
    """Whether live scores would have sent the input to other experts than the replayed ones."""


Objective = Callable[[Targets, TargetFacts], Tensor]
"""Gives c (X), of which the sum over the whole step has been divided by the step's normaliser."""


class PosttrainLoss(nn.Module):
    """One forward pass, which is what data parallelism wraps."""

    def __init__(
        self,
        model: Model,
        compute_dtype: torch.dtype,
        *,
        seq_balance_loss_weight: float = 0.0,
        detach_mtp: bool = False,
        activation_checkpointing: bool = False,
        temperature: float = 1.0,
    ) -> None:
        """`detach_mtp`: the modules' losses train the modules alone, not what they share with the model."""
        super().__init__()
        self.model = model
        self.compute_dtype = compute_dtype
        self.seq_balance_loss_weight = seq_balance_loss_weight
        self.detach_mtp = detach_mtp
        self.activation_checkpointing = activation_checkpointing
        self.temperature = temperature

    def forward(
        self, packed: PackedSamples, objective: Any, weights_H: Tensor, mtp_loss_weight: float, fraction: float
    ) -> LossOutput:
        """`objective` is what `_main_loss` takes, `weights_H` are the global sums of target weights, `fraction` is this
        micro-batch's part of the samples."""
        hidden = self._hidden(packed, mtp=len(self.model.mtp) > 0)
        total, main_sum = self._main_loss(packed, hidden, objective)
        total = total + self.seq_balance_loss_weight * fraction * hidden.router.balance_loss
        sums_H = [main_sum]
        if hidden.mtp_h_BSD:
            mtp_sums = [self._mtp_sum(packed, k, h_BSD) for k, h_BSD in enumerate(hidden.mtp_h_BSD, start=1)]
            total = total + mtp_loss_weight * weighted_means(torch.stack(mtp_sums), weights_H[1:]).mean()
            sums_H += [each.detach() for each in mtp_sums]
        balance = hidden.router.balance_loss.detach() * fraction
        return LossOutput(total, torch.stack(sums_H), balance, hidden.router.tokens_per_expert_LE)

    def _main_loss(self, packed: PackedSamples, hidden: HiddenStates, objective: Any) -> tuple[Tensor, Tensor]:
        """With an `Objective`: the main head's loss to differentiate; and Σ weight·(−log p), detached, to report."""
        logprobs_X, facts = self._facts(packed, hidden)
        total = -(objective(packed.targets, facts) * logprobs_X).sum()
        return total, -(packed.targets.weights_X * facts.logprobs_X).sum()

    @torch.no_grad()
    def facts(self, packed: PackedSamples) -> TargetFacts:
        """The same log-probabilities without a gradient."""
        return self._facts(packed, self._hidden(packed, mtp=False))[1]

    def _hidden(self, packed: PackedSamples, mtp: bool) -> HiddenStates:
        return self.model.forward_hidden(
            packed.batch.inputs,
            cu_seqlens=packed.batch.cu_seqlens,
            mtp=mtp,
            detach_mtp=self.detach_mtp,
            topk_ids_LBSK=packed.topk_ids_LBSK,
            compute_dtype=self.compute_dtype,
            activation_checkpointing=self.activation_checkpointing and torch.is_grad_enabled(),
        )

    def _facts(self, packed: PackedSamples, hidden: HiddenStates) -> tuple[Tensor, TargetFacts]:
        """The main head's log-probabilities with their gradient, and everything detached."""
        index_X = packed.index_X
        # The head is computed in float32: in bfloat16 ratios of probabilities would be rounded to 1 %.
        h_XD = hidden.h_BSD.flatten(0, 1)[index_X].to(self.model.lm_head.weight.dtype)
        targets_X = packed.batch.targets_HBS[0].flatten()[index_X]
        logprobs_X, entropies_X = linear_logprobs(
            h_XD, self.model.lm_head.weight, targets_X, self.temperature, packed.mask
        )
        rerouted_BS = hidden.router.rerouted_BS
        rerouted_X = None if rerouted_BS is None else rerouted_BS.flatten()[index_X]
        return logprobs_X, TargetFacts(logprobs_X.detach(), entropies_X.detach(), rerouted_X)

    def _mtp_sum(self, packed: PackedSamples, k: int, h_BSD: Tensor) -> Tensor:
        """Σ weight·(−log p) of head k, at temperature 1 over the whole vocabulary, as a draft's logits are used."""
        targets_N, weights_N = packed.batch.targets_HBS[k].flatten(), packed.batch.weights_HBS[k].flatten()  # type: ignore[index]
        index_X = (weights_N != 0).nonzero()[:, 0]
        head_OD = self.model.lm_head.weight
        head_OD = head_OD.detach() if self.detach_mtp else head_OD
        logprobs_X, _ = linear_logprobs(h_BSD.flatten(0, 1)[index_X], head_OD, targets_N[index_X])
        return -(weights_N[index_X] * logprobs_X).sum()
