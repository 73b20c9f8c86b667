"""Where drafts fail: the MTP modules' predictions on a real text, against those of the main head.

Teacher-forced: every module gets the true tokens. Greedy decoding would accept a draft where the module's most likely
token is also the main head's; whether it is the text's token as well is counted separately.

Shapes: N tokens of the text, M of them drafted.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.text import Tokens, readable
from fathom.lab.inspector.trace import Predictions, Trace

_WORST, _CONTEXT = 20, 10


class ClassRate(TypedDict):
    """Drafts of one class of tokens. Rates are null where there were none."""

    name: str
    drafts: int
    agree: float | None
    """The share that is the model's most likely token."""
    right: float | None
    """The share that is the text's token."""


class FailedDraft(TypedDict):
    """A position where a draft would have been rejected."""

    place: int
    """Position of the token in the text."""
    before: str
    """The tokens before it."""
    token: str
    """The text's token."""
    choice: str
    """The model's most likely token."""
    choice_p: float
    """Its probability."""
    draft: str
    """The module's most likely token."""
    draft_p: float
    """Its probability by the module."""
    missed_bits: float
    """−log2 of the module's probability of the model's most likely token."""


class DraftFacts(TypedDict):
    """The predictions of one MTP module."""

    module: int
    """From 1."""
    drafts: int
    agree: float | None
    right: float | None
    classes: list[ClassRate]
    failed: list[FailedDraft]
    """The costliest rejected drafts: by the model's probability of its token times `missed_bits`."""


def draft_facts(module: int, tokens: Tokens, trace: Trace, tokenizer: Tokenizer) -> DraftFacts:
    """MTP module `module`, from 0, over the whole text."""
    predictions = trace.drafts[module]
    drafted_N = predictions.top_N >= 0
    agree_N, right_N = predictions.top_N == trace.main.top_N, predictions.top_N == trace.tokens_N
    classes = []
    for place, name in enumerate(tokens.class_names):
        of_class_N = drafted_N & (tokens.classes_N == place)
        rates = ClassRate(
            name=name,
            drafts=int(of_class_N.sum()),
            agree=_share(agree_N, of_class_N),
            right=_share(right_N, of_class_N),
        )
        classes.append(rates)
    worst = costliest(predictions, trace.main, drafted_N & ~agree_N)
    return DraftFacts(
        module=module + 1,
        drafts=int(drafted_N.sum()),
        agree=_share(agree_N, drafted_N),
        right=_share(right_N, drafted_N),
        classes=classes,
        failed=[_failed(int(place), predictions, tokens, trace, tokenizer) for place in worst],
    )


def costliest(predictions: Predictions, main: Predictions, failed_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Positions of the costliest failed drafts, by descending cost."""
    cost_N = np.where(failed_N, main.top_p_N * predictions.nats_N, -1.0)
    return np.argsort(-cost_N, kind="stable")[: min(_WORST, int(failed_N.sum()))]


def _share(yes_N: NDArray[np.bool_], of_N: NDArray[np.bool_]) -> float | None:
    return round(float(yes_N[of_N].mean()), 4) if of_N.any() else None


def _failed(place: int, predictions: Predictions, tokens: Tokens, trace: Trace, tokenizer: Tokenizer) -> FailedDraft:
    before = b"".join(tokens.token_bytes[max(0, place - _CONTEXT) : place])
    return FailedDraft(
        place=place,
        before=readable(before),
        token=readable(tokens.token_bytes[place]),
        choice=readable(tokenizer.token_bytes(int(trace.main.top_N[place]))),
        choice_p=round(float(trace.main.top_p_N[place]), 4),
        draft=readable(tokenizer.token_bytes(int(predictions.top_N[place]))),
        draft_p=round(float(predictions.top_p_N[place]), 4),
        missed_bits=round(float(predictions.nats_N[place] / np.log(2)), 2),
    )
