"""One optimizer step, for every training loop: accumulate, clip, apply, balance the routers, skip what is not finite.

A loop brings its own batches and its own loss, and calls `optimizer_step` once a step; nothing here depends on what the
loss is. Whatever a loop trains, gradients add up over micro-batches and ranks to those of one big batch, and the
correction biases move by the expert loads of the whole global batch.

Shapes: H summed losses that are reported (in pretraining the main head's and each MTP module's), L routers, E experts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fathom.distributed.ranks import Ranks, accumulating
from fathom.model.balance import max_violation, updated_bias
from fathom.model.transformer import Model
from fathom.train.bf16_weights import Bf16Weights
from fathom.train.optim import EMA
from fathom.train.schedule import StepHyperparameters

B = TypeVar("B")
"""A micro-batch, of whatever type the loss takes."""


class LossOutput(NamedTuple):
    """What a loss returns for one micro-batch: its part of the whole step's loss."""

    total: Tensor
    """The scalar to differentiate; the totals of all micro-batches and ranks add up to the step's loss."""
    sums_H: Tensor
    """Losses to report, each summed over this micro-batch's targets, detached."""
    balance: Tensor
    """This micro-batch's part of the step's balance loss, detached and not yet multiplied by α."""
    tokens_per_expert_LE: Tensor
    """Tokens each expert of each router received."""


@dataclass
class TrainState:
    """Everything that a training step changes."""

    model: Model
    loss: nn.Module
    """The loss around the model, replicated over the ranks."""
    optimizers: list[Optimizer]
    ema: EMA | None
    bf16_weights: Bf16Weights | None = None
    """On a GPU: the bfloat16 copies that the loss computes with, refreshed after every change of the weights."""
    step: int = 0
    """Optimizer steps done, skipped ones included."""
    skipped: int = 0
    """Steps skipped because the loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    first_loss: float | None = None
    """Pretraining's, of its first finite step."""
    high_in_a_row: int = 0
    """Steps in a row with a loss far above that."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, measured over the whole global batch."""

    means_H: tuple[float, ...]
    """Each reported loss, summed over its targets and divided by the sum of their weights."""
    balance_loss: float
    grad_norm: float
    """Before clipping."""
    max_vio: float
    """The worst router's; 0 in a model without routers."""
    tokens_per_expert_LE: Tensor
    skipped: bool

    @property
    def loss(self) -> float:
        """The first of the reported losses: the main head's."""
        return self.means_H[0]

    @property
    def mtp_loss(self) -> float | None:
        """The mean of the others, those of the MTP modules; None where there are none."""
        others = self.means_H[1:]
        return sum(others) / len(others) if others else None


def optimizer_step(
    state: TrainState,
    batches: Sequence[B],
    loss: Callable[[B], LossOutput],
    weights_H: Tensor,
    hyper: StepHyperparameters,
    ranks: Ranks,
) -> StepMetrics:
    """One step on a global batch, of which `batches` are this rank's micro-batches.

    `loss` runs `state.loss` on one of them; `weights_H` are the global sums of the weights of the targets, which the
    reported sums are divided by. A loss or gradient that is not finite leaves weights, moments and biases as they were.

    The host waits for a GPU once, to read the values that decide this; it then launches the update and can prepare the
    next step meanwhile.
    """
    sums_H, balance, tokens_per_expert_LE = _accumulate(state, batches, loss, ranks)
    weights = list(state.model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    values = (
        balance,
        norm,
        max_violation(tokens_per_expert_LE).max() if tokens_per_expert_LE.numel() else torch.zeros_like(norm),
        *weighted_means(sums_H, weights_H),
    )
    balance_loss, grad_norm, max_vio, *means_H = torch.stack([value.double() for value in values]).tolist()

    finite = math.isfinite(grad_norm) and all(map(math.isfinite, means_H))
    if finite:
        if grad_norm > hyper.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(weights, hyper.max_grad_norm, norm)
        _apply(state, hyper, tokens_per_expert_LE)
    state.skipped += not finite
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    state.step += 1
    return StepMetrics(tuple(means_H), balance_loss, grad_norm, max_vio, tokens_per_expert_LE, not finite)


def _accumulate(
    state: TrainState, batches: Sequence[B], loss: Callable[[B], LossOutput], ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor]:
    """Leave the whole step's gradient in `.grad`; returns summed losses, balance loss and loads of the global batch."""
    sums, balance, loads = [], [], []
    for i, batch in enumerate(batches):
        with accumulating(state.loss, last=i + 1 == len(batches)):
            output = loss(batch)
            # Replication averages gradients over ranks; `total` is already a part of the global loss.
            (output.total * ranks.world).backward()
        sums.append(output.sums_H)
        balance.append(output.balance)
        loads.append(output.tokens_per_expert_LE)
    if state.bf16_weights is not None:
        state.bf16_weights.collect()
    return (
        ranks.sum(torch.stack(sums).sum(0)),
        ranks.sum(torch.stack(balance).sum()),
        ranks.sum(torch.stack(loads).sum(0)),
    )


def weighted_means(sums_H: Tensor, weights_H: Tensor) -> Tensor:
    """Σ loss / Σ weight of each reported loss; 0 for one that has no targets in the whole batch."""
    return sums_H / torch.where(weights_H > 0, weights_H, 1).to(sums_H.dtype)


@torch.no_grad()
def _apply(state: TrainState, hyper: StepHyperparameters, tokens_per_expert_LE: Tensor) -> None:
    """Update weights, correction biases and the moving average."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = hyper.learning_rate
        optimizer.step()
    if state.bf16_weights is not None:
        state.bf16_weights.refresh()
    for router, tokens_per_expert_E in zip(state.model.routers(), tokens_per_expert_LE, strict=True):
        bias_E = router.e_score_correction_bias
        bias_E.copy_(updated_bias(bias_E, tokens_per_expert_E, hyper.bias_update_speed))
    if state.ema is not None:
        state.ema.update(state.model)
