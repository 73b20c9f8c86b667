"""The excerpts, token by token: how likely each was, the experts it took, what its heads attended to.

Shapes: T tokens of an excerpt with the begin token, L routers, K experts, H heads, Q queries, M keys kept.
"""

from typing import TypedDict

import numpy as np

from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.attention import KeptAttention
from fathom.lab.inspector.reading import Excerpt, Guesses, Reading
from fathom.lab.inspector.text import Tokens, spelling


class GuessFacts(TypedDict):
    """A head's first choice."""

    text: str
    p: float
    agrees: bool
    """Of the main head: it is the text's token. Of a module: it is the main head's first choice."""


class TokenFacts(TypedDict):
    """One token of an excerpt. The first one is the begin token, of which nothing was predicted."""

    text: str
    kind: int | None
    """Its class, by place in `classes`."""
    bits: float | None
    """−log2 of the probability the model gave it."""
    choice: GuessFacts | None
    """What the model thought likeliest."""
    drafts: list[GuessFacts | None]
    """What each MTP module thought likeliest; null where it made no guess."""
    experts: list[list[int] | None]
    """Per router the experts it took, heaviest first; null where it did not pass."""
    weights: list[list[float] | None]
    """Their weights."""
    attention: list[list[list[int]]] | None
    """Per layer and head: place, weight in thousandths, place, weight, … of the strongest tokens; places count in the
    excerpt, 0 being the begin token. Null where it was not kept."""


class ExcerptFacts(TypedDict):
    """A stretch of the text."""

    start: int
    """Place in the text of the token after the begin token."""
    tokens: list[TokenFacts]


def excerpt_facts(excerpt: Excerpt, tokens: Tokens, reading: Reading, tokenizer: Tokenizer) -> ExcerptFacts:
    """All about the excerpt's tokens."""
    order_LTK = np.argsort(-excerpt.weights_LTK, axis=-1, kind="stable")
    experts_LTK = np.take_along_axis(excerpt.experts_LTK, order_LTK, axis=-1)
    weights_LTK = np.take_along_axis(excerpt.weights_LTK, order_LTK, axis=-1)
    kept = {query: row for row, query in enumerate(excerpt.queries_Q)}
    found = []
    for place in range(experts_LTK.shape[1]):
        passed = [bool(len(ids_K)) and int(ids_K[0]) >= 0 for ids_K in experts_LTK[:, place]]
        at = excerpt.start + place - 1
        token = TokenFacts(
            text="" if place == 0 else spelling(tokens.spelled[at]),
            kind=None if place == 0 else int(tokens.classes_N[at]),
            bits=None if place == 0 else round(float(reading.said.nats_N[at] / np.log(2)), 3),
            choice=None if place == 0 else _guess(reading.said, at, int(reading.tokens_N[at]), tokenizer),
            drafts=[_draft(module, at, place, reading, tokenizer) for module in reading.drafts],
            experts=[ids_K.tolist() if ok else None for ids_K, ok in zip(experts_LTK[:, place], passed, strict=True)],
            weights=[
                [round(w, 4) for w in weights_K.tolist()] if ok else None
                for weights_K, ok in zip(weights_LTK[:, place], passed, strict=True)
            ],
            attention=[_heads(layer, kept[place]) for layer in excerpt.attention] if place in kept else None,
        )
        found.append(token)
    return ExcerptFacts(start=excerpt.start, tokens=found)


def attention_kept(reading: Reading) -> float | None:
    """The share of all attention weight, over the queries noted, that was kept."""
    layers = [layer.weights_HQM for excerpt in reading.excerpts for layer in excerpt.attention]
    rows = sum(weights_HQM[..., 0].numel() for weights_HQM in layers)
    return round(sum(float(weights_HQM.sum()) for weights_HQM in layers) / rows, 4) if rows else None


def _draft(module: Guesses, at: int, place: int, reading: Reading, tokenizer: Tokenizer) -> GuessFacts | None:
    if place == 0 or module.first_N[at] < 0:
        return None
    return _guess(module, at, int(reading.said.first_N[at]), tokenizer)


def _guess(guesses: Guesses, at: int, hoped: int, tokenizer: Tokenizer) -> GuessFacts:
    first = int(guesses.first_N[at])
    text, p = spelling(tokenizer.token_bytes(first)), round(float(guesses.first_p_N[at]), 4)
    return GuessFacts(text=text, p=p, agrees=first == hoped)


def _heads(layer: KeptAttention, row: int) -> list[list[int]]:
    heads = []
    for keys_M, weights_M in zip(layer.keys_HQM[:, row], layer.weights_HQM[:, row], strict=True):
        pairs = zip(keys_M.tolist(), (1000 * weights_M).round().int().tolist(), strict=True)
        heads.append([number for key, weight in pairs if weight for number in (key, weight)])
    return heads
