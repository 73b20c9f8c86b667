"""One step's logits become tokens, for requests that each have their own parameters and their own number of drafts.

A request that verifies M drafts has M + 1 consecutive positions of logits: after its last token, after draft 1, and
so on. Each position's distribution takes the drafts before it for output: penalties and min_tokens count them. A draft
stays when it is what the position's own logits choose. Requests without drafts take the same way. The usual step, all
greedy and nothing adjusted, costs one argmax and one transfer.

Shapes: B requests, N positions of all requests, T positions of one, M drafts, S prompt tokens, O vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fathom.engine.sampling.sampler import (
    SamplingParams,
    apply_logits_processors,
    draw,
    exponential_noise,
    probabilities,
)
from fathom.engine.speculative import accept
from fathom.model.layers import at_least_float32

_CHUNK = 256
"""Prompt positions whose log-probabilities are held at a time."""


class Constraint(Protocol):
    """Says what a request may generate, for example by a grammar."""

    def allowed(self, drafts: Sequence[int]) -> Tensor:
        """The ids that may follow the output so far, and those that may follow each draft: bool (M + 1, O).

        Rows behind a draft that is not allowed itself may say anything. Nothing is remembered.
        """

    def take(self, tokens: Sequence[int]) -> None:
        """These tokens were generated."""


@dataclass
class SamplingState:
    """One request's place in a step."""

    params: SamplingParams
    stream: int
    """Second key of its random numbers, such as the prompt's place among a call's prompts."""
    tokens: Sequence[int]
    """The prompt and the output so far."""
    prompt_length: int
    banned_until_min: tuple[int, ...] = ()
    """What would end it, and so cannot be chosen before min_tokens: stop ids, and end-of-text unless ignored."""
    drafts: list[int] = field(default_factory=list)
    """Tokens that may follow, to be verified in this step."""
    allowed_TO: Tensor | None = None
    """What may be chosen after the tokens and after each draft, where that is constrained."""


class TokenLogprob(NamedTuple):
    """How likely a token was by the model's own logits, before any processing."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: list[tuple[int, float]]
    """The likeliest ids with their log-probabilities, likeliest first."""


class SampledTokens(NamedTuple):
    """What one step decided for one row."""

    tokens: list[int]
    """The accepted drafts, then one more token."""
    accepted: int
    """How many of them were drafts."""
    logprobs: list[TokenLogprob] | None
    """One for each of `tokens`, where the row asks for them."""


def verify(logits_NO: Tensor, rows: Sequence[SamplingState]) -> list[SampledTokens]:
    """Decide each row's next tokens from 1 + len(drafts) consecutive positions of logits per row, in the rows' order.

    Raises ValueError where the positions are not as many as the rows and drafts need.
    """
    places = _places(rows, len(logits_NO))
    best_N = _likeliest(logits_NO)
    sampled = []
    for row, place in zip(rows, places, strict=True):
        if row.params.temperature > 0:
            sampled.append((row, place))
        elif _changes_logits(row):
            best_N[place] = _processed(logits_NO[place], row).argmax(-1)
    if sampled:
        drawn_N = _drawn([(row, logits_NO[place], 0) for row, place in sampled])
        best_N[torch.cat([torch.arange(place.start, place.stop) for _, place in sampled]).to(best_N.device)] = drawn_N
    chosen = best_N.tolist()  # the call's one transfer, but for log-probabilities
    decisions = []
    for row, place in zip(rows, places, strict=True):
        count = accept(row.drafts, chosen[place])
        decisions.append(SampledTokens(chosen[place.start : place.start + count + 1], count, None))
    if any(row.params.logprobs is not None for row in rows):
        return _with_logprobs(logits_NO, rows, places, decisions)
    return decisions


def draft(logits_BO: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """One more draft per row from a drafting module's logits at the place after `row.tokens` and `row.drafts`.

    They are processed, and drawn from, just as the model's own logits will be at that place. The rows stay as they are.
    """
    best_B = _likeliest(logits_BO)
    sampled = [b for b, row in enumerate(rows) if row.params.temperature > 0]
    for b, row in enumerate(rows):
        if row.params.temperature == 0 and _changes_logits(row):
            best_B[b] = _processed(logits_BO[b : b + 1], row)[0].argmax()
    if sampled:
        best_B[sampled] = _drawn([(rows[b], logits_BO[b : b + 1], len(rows[b].drafts)) for b in sampled])
    return best_B.tolist()


def prompt_logprobs(logits_SO: Tensor, following_S: Tensor, top: int) -> list[TokenLogprob]:
    """How likely each token was that followed, and the `top` likeliest ones, by the logits of the place before it."""
    found = []
    for part_NO, ids_N in zip(logits_SO.split(_CHUNK), following_S.split(_CHUNK), strict=True):
        found += _token_logprobs(part_NO, ids_N, top)
    return found


def _likeliest(logits_NO: Tensor) -> Tensor:
    """The first of the likeliest tokens (N) of each place."""
    if logits_NO.device.type == "cpu":
        # Some ten times as fast as torch's, which takes as long as a small model's whole step.
        return torch.from_numpy(at_least_float32(logits_NO).numpy().argmax(-1))
    return logits_NO.argmax(-1)


def _places(rows: Sequence[SamplingState], positions: int) -> list[slice]:
    """Which positions of the logits are each row's."""
    places, start = [], 0
    for row in rows:
        end = start + len(row.drafts) + 1
        places.append(slice(start, end))
        start = end
    if start != positions:
        raise ValueError(f"logits_NO has {positions} positions; rows with their drafts need {start}")
    return places


def _changes_logits(row: SamplingState) -> bool:
    """Whether its logits are anything but the model's own."""
    params = row.params
    return (
        row.allowed_TO is not None or params.changes_logits or len(row.tokens) - row.prompt_length < params.min_tokens
    )


def _processed(logits_TO: Tensor, row: SamplingState) -> Tensor:
    adjusted_TO = apply_logits_processors(
        logits_TO, row.params, row.tokens, row.prompt_length, row.drafts, row.banned_until_min
    )
    if row.allowed_TO is None:
        return adjusted_TO
    # A drafting module has logits for the last place alone.
    allowed_TO = row.allowed_TO[-len(logits_TO) :].to(logits_TO.device)
    return adjusted_TO.masked_fill(~allowed_TO, -math.inf)


def _distributions(sampled: Sequence[tuple[SamplingState, Tensor]]) -> list[Tensor]:
    """What each row draws from at its positions; rows with the same filters are filtered together."""
    logits = [_processed(logits_TO, row) if _changes_logits(row) else logits_TO for row, logits_TO in sampled]
    groups: dict[tuple[float, ...], list[int]] = {}
    for b, (row, _) in enumerate(sampled):
        params = row.params
        groups.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(b)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        probs_NO = probabilities(torch.cat([logits[b] for b in members]), sampled[members[0]][0].params)
        found.update(zip(members, probs_NO.split([len(logits[b]) for b in members]), strict=True))
    return [found[b] for b in range(len(sampled))]


def _drawn(sampled: Sequence[tuple[SamplingState, Tensor, int]]) -> Tensor:
    """The tokens (N) drawn at all positions of some rows: each row's logits (T, O), whose first position lies so
    many places after its next token's."""
    probs_NO = torch.cat(_distributions([(row, logits_TO) for row, logits_TO, _ in sampled]))
    races = [
        exponential_noise(row.params.seed, row.stream, len(row.tokens) + ahead + place, logits_TO.shape[1])
        for row, logits_TO, ahead in sampled
        for place in range(len(logits_TO))
    ]
    return draw(probs_NO, torch.stack(races).to(probs_NO.device))


def _with_logprobs(
    logits_NO: Tensor, rows: Sequence[SamplingState], places: Sequence[slice], decisions: Sequence[SampledTokens]
) -> list[SampledTokens]:
    """The decisions with log-probabilities where rows ask for them, all found in one go."""
    asking = [(r, row.params.logprobs) for r, row in enumerate(rows) if row.params.logprobs is not None]
    positions = [places[r].start + i for r, _ in asking for i in range(len(decisions[r].tokens))]
    ids_N = torch.tensor([token for r, _ in asking for token in decisions[r].tokens], device=logits_NO.device)
    facts = iter(_token_logprobs(logits_NO[positions], ids_N, max(top for _, top in asking)))
    found = list(decisions)
    for r, top in asking:
        own = [next(facts) for _ in found[r].tokens]
        found[r] = found[r]._replace(logprobs=[fact._replace(top=fact.top[:top]) for fact in own])
    return found


def _token_logprobs(logits_NO: Tensor, ids_N: Tensor, top: int) -> list[TokenLogprob]:
    logprobs_NO = at_least_float32(logits_NO).log_softmax(-1)
    own_N1 = logprobs_NO.gather(1, ids_N[:, None])
    ranks_N = (logprobs_NO > own_N1).sum(-1) + 1
    likeliest = logprobs_NO.topk(min(top, logits_NO.shape[1]), dim=-1)
    columns = (own_N1[:, 0].tolist(), ranks_N.tolist(), likeliest.indices.tolist(), likeliest.values.tolist())
    return [
        TokenLogprob(logprob, rank, list(zip(ids, values, strict=True)))
        for logprob, rank, ids, values in zip(*columns, strict=True)
    ]
