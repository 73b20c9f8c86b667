"""The excerpts, token by token: its probability, its experts, what its heads attended to.

Shapes: T tokens of an excerpt, BOS included, L routers, K experts, H heads, Q queries, M keys kept.
"""

from typing import TypedDict

import numpy as np

from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.attention import KeptAttention
from fathom.lab.inspector.text import Tokens, readable
from fathom.lab.inspector.trace import Excerpt, Predictions, Trace


class PredictionFacts(TypedDict):
    """The most likely token by one head."""

    text: str
    p: float
    agrees: bool
    """Main head: equals the text's token. MTP module: equals the main head's most likely token."""


class TokenFacts(TypedDict):
    """One token of an excerpt. The first one is BOS, which is not predicted."""

    text: str
    kind: int | None
    """Its class, an index into `classes`."""
    bits: float | None
    """−log2 of the model's probability of it."""
    choice: PredictionFacts | None
    """The model's most likely token."""
    drafts: list[PredictionFacts | None]
    """Each MTP module's most likely token; null where it made no prediction."""
    experts: list[list[int] | None]
    """Per router its experts, by descending weight; null where it did not pass through the layer."""
    weights: list[list[float] | None]
    """Their weights."""
    attention: list[list[list[int]]] | None
    """Per layer and head: position, weight in thousandths, position, weight, … of the strongest keys; positions in the
    excerpt, where 0 is BOS. Null where it was not kept."""


class ExcerptFacts(TypedDict):
    """A part of the text."""

    start: int
    """Position in the text of the token after BOS."""
    tokens: list[TokenFacts]


def excerpt_facts(excerpt: Excerpt, tokens: Tokens, trace: Trace, tokenizer: Tokenizer) -> ExcerptFacts:
    """Everything about the excerpt's tokens."""
    order_LTK = np.argsort(-excerpt.weights_LTK, axis=-1, kind="stable")
    experts_LTK = np.take_along_axis(excerpt.experts_LTK, order_LTK, axis=-1)
    weights_LTK = np.take_along_axis(excerpt.weights_LTK, order_LTK, axis=-1)
    kept = {query: row for row, query in enumerate(excerpt.queries_Q)}
    found = []
    for place in range(experts_LTK.shape[1]):
        passed = [bool(len(ids_K)) and int(ids_K[0]) >= 0 for ids_K in experts_LTK[:, place]]
        at = excerpt.start + place - 1
        token = TokenFacts(
            text="" if place == 0 else readable(tokens.token_bytes[at]),
            kind=None if place == 0 else int(tokens.classes_N[at]),
            bits=None if place == 0 else round(float(trace.main.nats_N[at] / np.log(2)), 3),
            choice=None if place == 0 else _prediction(trace.main, at, int(trace.tokens_N[at]), tokenizer),
            drafts=[_draft(module, at, place, trace, tokenizer) for module in trace.drafts],
            experts=[ids_K.tolist() if ok else None for ids_K, ok in zip(experts_LTK[:, place], passed, strict=True)],
            weights=[
                [round(w, 4) for w in weights_K.tolist()] if ok else None
                for weights_K, ok in zip(weights_LTK[:, place], passed, strict=True)
            ],
            attention=[_heads(layer, kept[place]) for layer in excerpt.attention] if place in kept else None,
        )
        found.append(token)
    return ExcerptFacts(start=excerpt.start, tokens=found)


def attention_kept(trace: Trace) -> float | None:
    """The share of all attention weight of the kept queries that was kept."""
    layers = [layer.weights_HQM for excerpt in trace.excerpts for layer in excerpt.attention]
    rows = sum(weights_HQM[..., 0].numel() for weights_HQM in layers)
    return round(sum(float(weights_HQM.sum()) for weights_HQM in layers) / rows, 4) if rows else None


def _draft(module: Predictions, at: int, place: int, trace: Trace, tokenizer: Tokenizer) -> PredictionFacts | None:
    if place == 0 or module.top_N[at] < 0:
        return None
    return _prediction(module, at, int(trace.main.top_N[at]), tokenizer)


def _prediction(predictions: Predictions, at: int, target: int, tokenizer: Tokenizer) -> PredictionFacts:
    first = int(predictions.top_N[at])
    text, p = readable(tokenizer.token_bytes(first)), round(float(predictions.top_p_N[at]), 4)
    return PredictionFacts(text=text, p=p, agrees=first == target)


def _heads(layer: KeptAttention, row: int) -> list[list[int]]:
    heads = []
    for keys_M, weights_M in zip(layer.keys_HQM[:, row], layer.weights_HQM[:, row], strict=True):
        pairs = zip(keys_M.tolist(), (1000 * weights_M).round().int().tolist(), strict=True)
        heads.append([value for key, weight in pairs if weight for value in (key, weight)])
    return heads
