"""The pretraining loss: main loss + λ·mean of the MTP losses + α·balance loss (report, sections 2.1.2 and 2.2).

Losses are SUMS over targets divided by the global sum of the targets' weights (their count) of the whole step, so
micro-batches and ranks of any size add up to the one-big-batch gradient. The whole logits never exist.

Shapes: B rows, S inputs of a row, M MTP modules, H = 1 + M heads, N = B·S targets of a head, D hidden.
"""

import torch
from torch import Tensor, nn

from fathom.data.batch import Batch
from fathom.model.transformer import Model
from fathom.ops.loss import linear_cross_entropy
from fathom.train.step import LossOutput, weighted_means


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

    def forward(self, batch: Batch, weights_H: Tensor, mtp_loss_weight: float, fraction: float) -> LossOutput:
        """`weights_H` are the global sums of target weights, `fraction` is this micro-batch's part of the sequences."""
        modules = self.model.config.num_nextn_predict_layers
        hidden = self.model.forward_hidden(
            batch.inputs,
            mtp=modules > 0,
            lookahead_BM=batch.lookahead,
            compute_dtype=self.compute_dtype,
            activation_checkpointing=self.activation_checkpointing,
        )
        sums = []
        weights = self.head_weights()
        for k, h_BSD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD)):
            targets_N = batch.targets_HBS[k].flatten()
            sums.append(linear_cross_entropy(h_BSD.flatten(0, 1), weights[k], targets_N))
        sums_H = torch.stack(sums)
        means_H = weighted_means(sums_H, weights_H)
        total = means_H[0] + self.seq_balance_loss_weight * fraction * hidden.router.balance_loss
        if modules:
            total = total + mtp_loss_weight * means_H[1:].mean()
        balance = hidden.router.balance_loss.detach() * fraction
        return LossOutput(total, sums_H.detach(), balance, hidden.router.tokens_per_expert_LE)

    def head_weights(self) -> list[Tensor]:
        """The output head (O, D) of the main model and of each MTP module: they share one."""
        return [self.model.lm_head.weight] * (1 + self.model.config.num_nextn_predict_layers)
