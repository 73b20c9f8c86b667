"""Likelihoods under a model: of continuations of a context, and of whole texts in bits per byte.

A text longer than the model's context is cut so that every token is predicted once: the first window begins with BOS,
each later one with the last token of the window before, and the last one reaches back as far as the context goes (as
lm-eval's rolling log-likelihood does).

Shapes: B rows, S inputs, D hidden.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fathom.data.tokenizer import Tokenizer
from fathom.eval.bits import score
from fathom.model.transformer import Model

_BATCH_TOKENS = 4096
"""Tokens per forward pass, where texts are shorter."""


class Continuation(NamedTuple):
    """Token ids to score, and the ids before them; neither may be empty."""

    context: Sequence[int]
    ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.context) + len(self.ids)


class Likelihood(NamedTuple):
    """The likelihood of a continuation."""

    logprob: float
    """Σ log p of its tokens."""
    greedy: bool
    """Whether each is the model's top-1 token at its position."""


@dataclass(frozen=True)
class TextBits:
    """How well a model predicts a text."""

    bits_per_byte: float
    """Σ −log2 p over its tokens / its size in UTF-8."""
    tokens: int
    bytes: int


def text_bits(model: Model, tokenizer: Tokenizer, text: str) -> TextBits:
    """Measure `text` as one document; raises ValueError for an empty one."""
    if not text:
        raise ValueError("the text is empty; there is nothing to measure")
    ids, size = tokenizer.encode(text, bos=False), len(text.encode())
    parts = list(windows(ids, tokenizer.bos_id, model.config.max_position_embeddings))
    nats = -sum(found.logprob for found in likelihoods(model, parts))
    return TextBits(nats / math.log(2) / size, len(ids), size)


def windows(ids: Sequence[int], first: int, longest: int) -> Iterator[Continuation]:
    """The windows in which a model with a context of `longest` tokens predicts a text that `first` precedes."""
    all_ids = [first, *ids]
    for begin in range(1, len(all_ids), longest):
        end = min(begin + longest, len(all_ids))
        yield Continuation(all_ids[max(0, end - 1 - longest) : begin], all_ids[begin:end])


@torch.no_grad()
def likelihoods(model: Model, parts: Sequence[Continuation]) -> list[Likelihood]:
    """The likelihood of each continuation; a context that does not fit loses its beginning.

    Raises ValueError for a continuation that alone exceeds the model's context, and for an empty part.
    """
    longest = model.config.max_position_embeddings
    for part in parts:
        if not part.context or not 1 <= len(part.ids) <= longest:
            raise ValueError(
                f"there are {len(part.context)} tokens of context and {len(part.ids)} to predict; there must be at "
                f"least one of each, and at most {longest} (max_position_embeddings) to predict"
            )
    found: dict[int, Likelihood] = {}
    for indices in _batches([min(part.length - 1, longest) for part in parts]):
        found |= zip(indices, _measure(model, [parts[index] for index in indices]), strict=True)
    return [found[index] for index in range(len(parts))]


def _batches(lengths: list[int]) -> Iterator[list[int]]:
    """The indices of all rows, rows of similar length together, as many as `_BATCH_TOKENS` allows."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        rows = max(1, _BATCH_TOKENS // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


def _measure(model: Model, parts: Sequence[Continuation]) -> list[Likelihood]:
    device, longest = model.embed_tokens.weight.device, model.config.max_position_embeddings
    rows = [torch.tensor([*part.context, *part.ids][:-1][-longest:], device=device) for part in parts]
    # Padding comes last, where no token attends to it.
    h_BSD = model.forward_hidden(pad_sequence(rows, batch_first=True)).h_BSD
    return [_likelihood(model, h_SD[: len(row)], part.ids) for h_SD, row, part in zip(h_BSD, rows, parts, strict=True)]


def _likelihood(model: Model, h_SD: Tensor, ids: Sequence[int]) -> Likelihood:
    targets_1S = torch.tensor([ids], device=h_SD.device)
    nats, predictions_1S = score(model, h_SD[None, -len(ids) :], targets_1S)
    return Likelihood(-nats.item(), torch.equal(predictions_1S, targets_1S))
