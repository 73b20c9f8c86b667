"""The pretraining loss: main loss + λ·mean of the MTP losses + α·balance loss (report, sections 2.1.2 and 2.2).

Losses are weighted SUMS over targets divided by the global sum of the weights (by default the count) of the step, so
micro-batches and ranks of any size add up to the one-big-batch gradient. The whole logits never exist.

Shapes: B rows, S inputs of a row, M MTP modules, H = 1 + M heads, N = B·S targets of a head, D hidden.
"""

import torch
from torch import Tensor, nn

from fathom.data.batch import Batch
from fathom.model.transformer import Model
from fathom.ops.loss import linear_cross_entropy, linear_logprobs
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
            batch.positions_BS,
            batch.cu_seqlens,
            mtp=modules > 0,
            lookahead_BM=batch.lookahead if batch.cu_seqlens is None else None,
            compute_dtype=self.compute_dtype,
            activation_checkpointing=self.activation_checkpointing,
        )
        h_HBSD = (hidden.h_BSD, *hidden.mtp_h_BSD)
        heads = zip(h_HBSD, self.head_weights(), strict=True)
        sums_H = torch.stack([_summed_loss(h_BSD, weight_OD, k, batch) for k, (h_BSD, weight_OD) in enumerate(heads)])
        means_H = weighted_means(sums_H, weights_H)
        total = means_H[0] + self.seq_balance_loss_weight * fraction * hidden.router.balance_loss
        if modules:
            total = total + mtp_loss_weight * means_H[1:].mean()
        balance = hidden.router.balance_loss.detach() * fraction
        return LossOutput(total, sums_H.detach(), balance, hidden.router.tokens_per_expert_LE)

    def head_weights(self) -> list[Tensor]:
        """The output head (O, D) of the main model and of each MTP module: they share one."""
        return [self.model.lm_head.weight] * (1 + self.model.config.num_nextn_predict_layers)


def _summed_loss(h_BSD: Tensor, weight_OD: Tensor, head: int, batch: Batch) -> Tensor:
    """Σ weight · (−log p) over the targets of a head, in nats."""
    h_ND, targets_N = h_BSD.flatten(0, 1), batch.targets_HBS[head].flatten()
    if batch.weights_HBS is None:
        return linear_cross_entropy(h_ND, weight_OD, targets_N)
    logprobs_N, _ = linear_logprobs(h_ND, weight_OD, targets_N)
    return -(batch.weights_HBS[head].flatten() * logprobs_N).sum()
