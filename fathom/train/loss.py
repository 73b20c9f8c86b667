"""The pretraining objective: main loss + λ·mean of the MTP losses + α·balance loss (report, sections 2.1.2 and 2.2).

Losses are SUMS over valid targets divided by the global count of valid targets of the whole step, so micro-batches and
ranks of any size add up to the one-big-batch gradient. The whole logits never exist.

Shapes: B rows, W = S + 1 + M tokens of a row (inputs, target of the last, lookahead of the M MTP modules), S inputs.
"""

import torch
from torch import Tensor, nn

from fathom.data.dataset import Batch, targets
from fathom.model.transformer import Model
from fathom.ops.loss import IGNORE, linear_cross_entropy
from fathom.train.step import LossOutput


def target_counts(batch: Batch, modules: int) -> Tensor:
    """Valid targets of the main head and of each MTP module, (1 + M) int64."""
    return torch.stack([(targets(batch, k + 1, modules) != IGNORE).sum() for k in range(modules + 1)])


class PretrainLoss(nn.Module):
    """The loss as one forward pass, which is what data parallelism wraps."""

    def __init__(
        self,
        model: Model,
        seq_balance_loss_weight: float,
        compute_dtype: torch.dtype,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.seq_balance_loss_weight = seq_balance_loss_weight
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = activation_checkpointing

    def forward(self, batch: Batch, counts_H: Tensor, mtp_loss_weight: float, fraction: float) -> LossOutput:
        """`counts_H` are the step's global target counts, `fraction` is this micro-batch's part of its sequences."""
        modules = self.model.config.num_nextn_predict_layers
        length = batch.tokens_BW.shape[1] - 1 - modules
        states = self.model.forward_hidden(
            batch.tokens_BW[:, :length],
            mtp=modules > 0,
            lookahead_BM=batch.tokens_BW[:, length : length + modules],
            compute_dtype=self.compute_dtype,
            activation_checkpointing=self.activation_checkpointing,
        )
        sums = []
        for k, h_BSD in enumerate((states.h_BSD, *states.mtp_h_BSD)):
            targets_N = targets(batch, k + 1, modules).flatten()
            sums.append(linear_cross_entropy(h_BSD.flatten(0, 1), self.model.head_of(k).weight, targets_N))
        sums_H = torch.stack(sums)
        means_H = sums_H / counts_H.clamp_min(1)
        total = means_H[0] + self.seq_balance_loss_weight * fraction * states.router.balance_loss
        if modules:
            total = total + mtp_loss_weight * means_H[1:].mean()
        balance = states.router.balance_loss.detach() * fraction
        return LossOutput(total, sums_H.detach(), balance, states.router.tokens_per_expert_LE)
