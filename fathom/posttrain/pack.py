"""Samples of any lengths, packed into one row of segments that do not see each other; nothing is padded.

A sample's tokens carry what a loss needs of each of them as a target: its weight, values such as an advantage, and for
rollouts the experts it was routed to and the ids it was sampled from.

Shapes: T tokens of a sample, S inputs of all samples, X targets of them that have a weight, H heads (the main one, then
one per MTP module), L MoE layers, K experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from fathom.config import ConfigError
from fathom.data.batch import Batch, packed_batch
from fathom.ops.loss import IGNORE, SamplingMask

S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, eq=False)
class Sample:
    """A sequence to train on."""

    tokens_T: Tensor
    """int64."""
    weights_T: Tensor
    """Float: each token's weight in the loss, as a target; 0 for what is only read, such as a prompt."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values (T) of the tokens as targets."""
    topk_ids_LTK: Tensor | None = None
    """int16: the experts of every token, or of every one but the last; None: routed live."""
    kept_ids: Sequence[Tensor | None] | None = None
    """Of each token, the ids it was sampled from; None: all of them."""

    def __len__(self) -> int:
        return len(self.tokens_T)


@dataclass(frozen=True, eq=False)
class Targets:
    """What an objective sees of a micro-batch: the targets that have a weight, one sample after another."""

    weights_X: Tensor
    sample_X: Tensor
    """The sample, counted within the micro-batch, that each target belongs to, int64."""
    values: Mapping[str, Tensor]
    """Each (X)."""
    samples: int

    def sums(self, values_X: Tensor) -> Tensor:
        """The sums of each sample's values (samples)."""
        return values_X.new_zeros(self.samples).index_add_(0, self.sample_X, values_X)


@dataclass(frozen=True, eq=False)
class PackedSamples:
    """A micro-batch."""

    batch: Batch
    """One row of S tokens, with `cu_seqlens` and a weight for every target."""
    index_X: Tensor
    """The inputs whose next token is a target of the main head."""
    targets: Targets
    topk_ids_LBSK: Tensor | None
    mask: SamplingMask | None
    """Of the targets."""

    @property
    def samples(self) -> int:
        return self.targets.samples

    def to(self, device: torch.device) -> "PackedSamples":
        """The micro-batch on a device."""
        if device.type == "cpu":
            return self
        targets = replace(
            self.targets,
            weights_X=self.targets.weights_X.to(device),
            sample_X=self.targets.sample_X.to(device),
            values={name: value_X.to(device) for name, value_X in self.targets.values.items()},
        )
        topk_ids_LBSK = None if self.topk_ids_LBSK is None else self.topk_ids_LBSK.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        return PackedSamples(self.batch.to(device), self.index_X.to(device), targets, topk_ids_LBSK, mask)


def micro_batches(samples: Sequence[S], tokens: int) -> Iterator[list[S]]:
    """The samples, or pairs of them, in their order, cut where a micro-batch would have more than `tokens` tokens.

    Raises ConfigError for a sample that is longer by itself.
    """
    part: list[S] = []
    for sample in samples:
        if len(sample) > tokens:
            raise ConfigError(
                f"train.micro_batch_tokens is {tokens}; it must be at least {len(sample)}, a sample's tokens"
            )
        if part and sum(map(len, part)) + len(sample) > tokens:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def pack(samples: Sequence[Sample], modules: int, absent_X: Tensor | None = None) -> PackedSamples:
    """Put the samples one after another; `absent_X` are ids that are never sampled, `modules` the MTP modules.

    All samples, or none, have a routing. Raises ValueError where no token has a weight.
    """
    tokens_1S = torch.cat([sample.tokens_T for sample in samples])[None]
    lengths = torch.tensor([len(sample) for sample in samples])
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(torch.int32)
    batch = packed_batch(tokens_1S, cu_seqlens, modules)
    weights_HBS = torch.stack([_ahead(samples, "weights", k)[None] for k in range(1, modules + 2)]).float()
    # A target without weight takes no part in any head's loss.
    targets_HBS = batch.targets_HBS.masked_fill(weights_HBS == 0, IGNORE)
    index_X = (targets_HBS[0, 0] != IGNORE).nonzero()[:, 0]
    if len(index_X) == 0:
        raise ValueError("no token of these samples is to be trained")
    sample_S = torch.arange(len(samples)).repeat_interleave(lengths)
    values = {name: _ahead(samples, name, 1)[index_X] for name in samples[0].values}
    targets = Targets(weights_HBS[0, 0, index_X], sample_S[index_X], values, len(samples))
    mask = _mask(samples, index_X, absent_X)
    batch = replace(batch, targets_HBS=targets_HBS, weights_HBS=weights_HBS)
    return PackedSamples(batch, index_X, targets, _routing(samples), mask)


def _ahead(samples: Sequence[Sample], name: str, k: int) -> Tensor:
    """At each input the value of the token k places ahead in its sample, 0 where there is none (S)."""
    parts = []
    for sample in samples:
        values_T = sample.weights_T if name == "weights" else sample.values[name]
        parts.append(torch.cat((values_T[k:], values_T.new_zeros(min(k, len(values_T))))))
    return torch.cat(parts)


def _routing(samples: Sequence[Sample]) -> Tensor | None:
    """The replayed experts (L, 1, S, K); a last token that was never fed takes those of the token before it."""
    if samples[0].topk_ids_LTK is None:
        return None
    parts = []
    for sample in samples:
        ids_LTK = sample.topk_ids_LTK
        assert ids_LTK is not None
        missing = len(sample) - ids_LTK.shape[1]
        parts += [ids_LTK, ids_LTK[:, -1:].expand(-1, missing, -1)]
    return torch.cat(parts, dim=1)[:, None].long()


def _mask(samples: Sequence[Sample], index_X: Tensor, absent_X: Tensor | None) -> SamplingMask | None:
    kept: list[Tensor | None] = []
    for sample in samples:
        own = sample.kept_ids or [None] * len(sample)
        kept += [*own[1:], None]  # of each input's next token
    chosen = [kept[index] for index in index_X.tolist()]
    if absent_X is None and all(ids is None for ids in chosen):
        return None
    empty = torch.empty(0, dtype=torch.int64)
    ids = [empty if each is None else each.long() for each in chosen]
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return SamplingMask(torch.cat(ids), offsets, absent_X)
