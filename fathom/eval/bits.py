"""Held-out quality: bits per byte, losses, MTP agreement and expert balance, in one pass over the held-out
rows.

Bits per byte is Σ −log2 p over all held-out tokens / UTF-8 bytes of the held-out text, so tokenizers compare.
MTP agreement is teacher-forced: how often a module's top-1 token is the main model's for the same position of the text
(DeepSeek-V3 report, section 2.2). MaxVio is that of Loss-Free Balancing (arXiv
2408.15664, section 4).

Shapes: B rows, S inputs of a row, T inputs and lookahead, N positions (or batches), M MTP modules, H = 1 + M heads,
D hidden, O vocabulary, L routers, E experts, K experts per token.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.data.batch import Batch
from fathom.distributed.ranks import SINGLE_PROCESS, Ranks
from fathom.model.balance import max_violation
from fathom.model.layers import at_least_float32
from fathom.model.outputs import HiddenStates
from fathom.model.transformer import Model
from fathom.ops.loss import IGNORE

_CHUNK_TOKENS = 1024
"""Positions whose logits are in memory at one time."""


@dataclass(frozen=True)
class Evaluation:
    """The results of one pass over held-out text. A fraction of nothing is NaN."""

    bits_per_byte: float
    """Of the main head."""
    loss: float
    """Of the main head, nats per token."""
    tokens: int
    """Targets of the main head."""
    mtp_losses: tuple[float, ...]
    """Each MTP module's loss over its own valid targets, nats per token."""
    mtp_agreement: tuple[float, ...]
    """For each module, the fraction of tokens for which it and the main model have the same top-1 prediction."""
    tokens_per_expert_LE: Tensor
    """Tokens each expert received, without padding: MoE layers, then MTP modules (int64, CPU)."""
    max_vio_global: tuple[float, ...]
    """Each router's MaxVio of those summed loads."""
    max_vio_batch: tuple[float, ...]
    """Each router's MaxVio within a batch, averaged over the batches."""


@torch.no_grad()
def evaluate(
    model: Model,
    batches: Sequence[Batch],
    total_bytes: int,
    compute_dtype: torch.dtype | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Evaluation:
    """Measure `model`, its MTP modules included, on batches with targets for all of its heads.

    A collective call: `batches` are the same on every rank, each rank measures some of them, and all get the result,
    the same to the last bit whatever the number of ranks.

    `total_bytes` are the UTF-8 bytes of the text that the rows' targets spell, `compute_dtype` is the type of
    the activations (None: that of the weights). Raises ValueError for batches of a model with
    another number of MTP modules, without any target, or for a `total_bytes` below 1.
    """
    if total_bytes < 1:
        raise ValueError(f"total_bytes is {total_bytes}; it must be the held-out text's size, at least 1")
    own_batches = (batches[i] for i in range(ranks.rank, len(batches), ranks.world))
    own, loads = _measure_all(model, own_batches, compute_dtype)
    gathered = ranks.gather((own, loads))
    # Batches were dealt out to the ranks one by one; summed in their own order, their number changes no rounding.
    parts = [gathered[i % ranks.world][0][i // ranks.world] for i in range(len(batches))]
    if not any(part.targets_H[0] for part in parts):
        raise ValueError("batches hold no target; evaluation needs at least one token to predict")
    *sums, max_vio_NL = (torch.stack(column) for column in zip(*parts, strict=True))
    nats_H, targets_H, agreed_M, compared_M = (column.sum(0) for column in sums)
    tokens_per_expert_LE = torch.stack([loads for _, loads in gathered if loads is not None]).sum(0)
    losses = (nats_H / targets_H).tolist()
    return Evaluation(
        bits_per_byte=nats_H[0].item() / math.log(2) / total_bytes,
        loss=losses[0],
        tokens=int(targets_H[0]),
        mtp_losses=tuple(losses[1:]),
        mtp_agreement=tuple((agreed_M.double() / compared_M).tolist()),
        tokens_per_expert_LE=tokens_per_expert_LE,
        max_vio_global=tuple(max_violation(tokens_per_expert_LE).tolist()),
        # A batch in which a router received no token has no balance: 0/0, left out of the mean.
        max_vio_batch=tuple(max_vio_NL.nanmean(0).tolist()),
    )


class _Part(NamedTuple):
    """Sums over one batch, on the CPU; H = 1 + M heads, the main one first."""

    nats_H: Tensor
    targets_H: Tensor
    agreed_M: Tensor
    compared_M: Tensor
    max_vio_L: Tensor


def _measure_all(
    model: Model, batches: Iterable[Batch], compute_dtype: torch.dtype | None
) -> tuple[list[_Part], Tensor | None]:
    """Each batch's sums, and the tokens that each expert received in all of them (None without batches)."""
    parts, total_LE = [], None
    for batch in batches:
        part, tokens_per_expert_LE = _measure(model, batch, compute_dtype)
        parts.append(part)
        total_LE = tokens_per_expert_LE if total_LE is None else total_LE + tokens_per_expert_LE
    return parts, total_LE


def _measure(model: Model, batch: Batch, compute_dtype: torch.dtype | None) -> tuple[_Part, Tensor]:
    modules, device = model.config.num_nextn_predict_layers, model.embed_tokens.weight.device
    batch, length = batch.to(device), batch.targets_HBS.shape[2]
    if len(batch.targets_HBS) != 1 + modules:
        raise ValueError(
            f"the batch has targets for {len(batch.targets_HBS)} heads; it must have {1 + modules}: the main one and "
            f"{modules} MTP modules"
        )
    hidden = model.forward_hidden(
        batch.inputs,
        batch.positions_BS,
        batch.cu_seqlens,
        mtp=modules > 0,
        lookahead_BM=batch.lookahead if batch.cu_seqlens is None else None,
        compute_dtype=compute_dtype,
    )
    h_HBSD = (hidden.h_BSD, *hidden.mtp_h_BSD)
    targets, heads = batch.targets_HBS, zip(h_HBSD, batch.targets_HBS, range(1 + modules), strict=True)
    nats, predictions = zip(*(score(model, *head) for head in heads), strict=True)
    # Module k at position i and the main head at i+k predict the same token; the last k have no main prediction.
    compared = [targets[k][:, : length - k] != IGNORE for k in range(1, len(targets))]
    agreed = [
        (predictions[k][:, : length - k] == predictions[0][:, k:]) & compared[k - 1] for k in range(1, len(targets))
    ]
    tokens_per_expert_LE = _loads(model, hidden, batch)
    part = _Part(
        nats_H=torch.stack(nats).cpu(),
        targets_H=_counts([targets_BS != IGNORE for targets_BS in targets]),
        agreed_M=_counts(agreed),
        compared_M=_counts(compared),
        max_vio_L=max_violation(tokens_per_expert_LE),
    )
    return part, tokens_per_expert_LE


def score(model: Model, h_BSD: Tensor, targets_BS: Tensor, module: int = 0) -> tuple[Tensor, Tensor]:
    """Summed −log p (float64) and top-1 predictions (B, S) of the main head (0) or of an MTP module."""
    nats = torch.zeros((), dtype=torch.float64, device=h_BSD.device)
    predictions = []
    chunks = (tensor.split(_CHUNK_TOKENS) for tensor in (h_BSD.flatten(0, 1), targets_BS.flatten()))
    for h_ND, targets_N in zip(*chunks, strict=True):
        logits_NO = at_least_float32(model.logits(h_ND, module))
        nats += F.cross_entropy(logits_NO, targets_N, ignore_index=IGNORE, reduction="sum")
        predictions.append(logits_NO.argmax(-1))
    return nats, torch.cat(predictions).view_as(targets_BS)


def _loads(model: Model, hidden: HiddenStates, batch: Batch) -> Tensor:
    """Tokens each expert received, (L, E) on the CPU. The model's own count would include padding."""
    length, experts = hidden.h_BSD.shape[1], model.config.n_routed_experts
    loads = []
    for layer, topk_ids_BSK in enumerate(hidden.router.topk_ids_LBSK):
        if batch.padding_BT is not None:
            # The token that module k routes at position i is t_{i+k}.
            ahead = max(0, layer + 1 - model.config.num_moe_layers)
            topk_ids_BSK = topk_ids_BSK[~batch.padding_BT[:, ahead : ahead + length]]
        loads.append(topk_ids_BSK.flatten().bincount(minlength=experts))
    return torch.stack(loads).cpu() if loads else torch.zeros(0, experts, dtype=torch.int64)


def _counts(masks: list[Tensor]) -> Tensor:
    """The number of true elements of each mask; int64 on the CPU."""
    return torch.tensor([int(mask.sum()) for mask in masks], dtype=torch.int64)
