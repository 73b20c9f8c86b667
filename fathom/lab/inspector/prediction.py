"""Where drafts fail: what the MTP modules guessed for each token of a real text, against what the model itself said.

Teacher-forced: every module reads the true tokens. A draft would be accepted by greedy decoding where the module's
first choice is the main head's first choice for the same token; whether it is also the text's own token is told apart.

Shapes: N tokens of the text, M of them drafted.
"""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from fathom.data.tokenizer import Tokenizer
from fathom.lab.inspector.reading import Guesses, Reading
from fathom.lab.inspector.text import Tokens, spelling

_WORST, _CONTEXT = 20, 10


class ClassRate(TypedDict):
    """Drafts of one class of tokens. Rates are null where there were none."""

    name: str
    drafts: int
    agree: float | None
    """The share that is the model's own first choice."""
    right: float | None
    """The share that is the text's token."""


class FailedDraft(TypedDict):
    """A place where a draft would have been refused."""

    place: int
    """Of the token in the text."""
    before: str
    """The tokens before it."""
    token: str
    """What stands there."""
    choice: str
    """The model's own first choice."""
    choice_p: float
    """The probability it gave it."""
    draft: str
    """The module's first choice."""
    draft_p: float
    """The probability the module gave it."""
    missed_bits: float
    """−log2 of the probability that the module gave the model's choice."""


class DraftFacts(TypedDict):
    """One MTP module's guesses."""

    module: int
    """From 1."""
    drafts: int
    agree: float | None
    right: float | None
    classes: list[ClassRate]
    failed: list[FailedDraft]
    """Those refused that cost most: by the model's own confidence times the bits the module missed it by."""


def draft_facts(module: int, tokens: Tokens, reading: Reading, tokenizer: Tokenizer) -> DraftFacts:
    """Module number `module`, from 0, over the whole text."""
    guesses = reading.drafts[module]
    drafted_N = guesses.first_N >= 0
    agree_N, right_N = guesses.first_N == reading.said.first_N, guesses.first_N == reading.tokens_N
    classes = []
    for place, name in enumerate(tokens.class_names):
        here_N = drafted_N & (tokens.classes_N == place)
        rates = ClassRate(
            name=name, drafts=int(here_N.sum()), agree=_share(agree_N, here_N), right=_share(right_N, here_N)
        )
        classes.append(rates)
    worst = costliest(guesses, reading.said, drafted_N & ~agree_N)
    return DraftFacts(
        module=module + 1,
        drafts=int(drafted_N.sum()),
        agree=_share(agree_N, drafted_N),
        right=_share(right_N, drafted_N),
        classes=classes,
        failed=[_failed(int(place), guesses, tokens, reading, tokenizer) for place in worst],
    )


def costliest(guesses: Guesses, said: Guesses, failed_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Places of the failed drafts that cost most, dearest first."""
    cost_N = np.where(failed_N, said.first_p_N * guesses.nats_N, -1.0)
    return np.argsort(-cost_N, kind="stable")[: min(_WORST, int(failed_N.sum()))]


def _share(yes_N: NDArray[np.bool_], of_N: NDArray[np.bool_]) -> float | None:
    return round(float(yes_N[of_N].mean()), 4) if of_N.any() else None


def _failed(place: int, guesses: Guesses, tokens: Tokens, reading: Reading, tokenizer: Tokenizer) -> FailedDraft:
    before = b"".join(tokens.spelled[max(0, place - _CONTEXT) : place])
    return FailedDraft(
        place=place,
        before=spelling(before),
        token=spelling(tokens.spelled[place]),
        choice=spelling(tokenizer.token_bytes(int(reading.said.first_N[place]))),
        choice_p=round(float(reading.said.first_p_N[place]), 4),
        draft=spelling(tokenizer.token_bytes(int(guesses.first_N[place]))),
        draft_p=round(float(guesses.first_p_N[place]), 4),
        missed_bits=round(float(guesses.nats_N[place] / np.log(2)), 2),
    )
