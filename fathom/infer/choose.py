"""One step's logits become tokens, for requests that each have their own parameters and their own number of drafts.

A request that verifies M drafts has M + 1 consecutive positions of logits: after its last token, after draft 1, and
so on. Each position's distribution takes the drafts before it for output: penalties and min_tokens count them. Where
tokens are drawn, `accept` judges the drafts; greedily, a draft stays when it is the likeliest token. Requests
without drafts take the same way. The usual step, all greedy and nothing adjusted, costs one argmax and one transfer.

Shapes: B requests, N positions of all requests, T positions of one, M drafts, S prompt tokens, O vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fathom.infer.sampler import ACCEPT, DRAFT, TOKEN, SamplingParams, adjust, draw, probabilities, uniforms
from fathom.infer.speculative import Accepted, accept, accept_greedy
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
class Row:
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
    draft_probs: Tensor | None = None
    """The distributions that sampled drafts were drawn from, (M, O); None for greedy rows and without drafts."""
    allowed_TO: Tensor | None = None
    """What may be chosen after the tokens and after each draft, where that is constrained."""


class TokenLogprob(NamedTuple):
    """How likely a token was by the model's own logits, before any processing."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: list[tuple[int, float]]
    """The likeliest ids with their log-probabilities, likeliest first."""


class Decision(NamedTuple):
    """What one step decided for one row."""

    tokens: list[int]
    """The accepted drafts, then one more token."""
    accepted: int
    """How many of them were drafts."""
    logprobs: list[TokenLogprob] | None
    """One for each of `tokens`, where the row asks for them."""


def choose(logits_NO: Tensor, rows: Sequence[Row]) -> list[Decision]:
    """Decide each row's next tokens from 1 + len(drafts) consecutive positions of logits per row, in the rows' order.

    Raises ValueError where the positions are not as many as the rows and drafts need.
    """
    places = _places(rows, len(logits_NO))
    best_N = logits_NO.argmax(-1)
    sampled = []
    for row, place in zip(rows, places, strict=True):
        if row.params.temperature > 0:
            sampled.append((row, logits_NO[place]))
        elif _is_adjusted(row):
            best_N[place] = _adjusted(logits_NO[place], row).argmax(-1)
    if sampled:
        best_N = torch.cat((best_N, *_judge(sampled)))
    # The call's one transfer, but for log-probabilities: greedy choices, then the sampled rows' counts and tokens.
    numbers = best_N.tolist()
    end = len(numbers) - 2 * len(sampled)
    drawn = zip(numbers[end : end + len(sampled)], numbers[end + len(sampled) :], strict=True)
    decisions = []
    for row, place in zip(rows, places, strict=True):
        if row.params.temperature > 0:
            count, token = next(drawn)
            tokens = [*row.drafts[:count], token]
        else:
            count = accept_greedy(row.drafts, numbers[place])
            tokens = numbers[place.start : place.start + count + 1]
        decisions.append(Decision(tokens, count, None))
    if any(row.params.logprobs is not None for row in rows):
        return _with_logprobs(logits_NO, rows, places, decisions)
    return decisions


def draft(logits_BO: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[Tensor | None]]:
    """One more draft per row from a drafting module's logits at the place after `row.tokens` and `row.drafts`.

    Greedy rows take the likeliest token, sampled ones draw from a distribution, which is returned beside it for
    the acceptance rule: (O). Both are processed just as the model's own logits will be. The rows stay as they are.
    """
    best_B = logits_BO.argmax(-1)
    sampled = [b for b, row in enumerate(rows) if row.params.temperature > 0]
    probs: list[Tensor | None] = [None] * len(rows)
    for b, row in enumerate(rows):
        if row.params.temperature == 0 and _is_adjusted(row):
            best_B[b] = _adjusted(logits_BO[b : b + 1], row)[0].argmax()
    if sampled:
        q_BO = torch.cat(_distributions([(rows[b], logits_BO[b : b + 1]) for b in sampled]))
        chances = [_uniforms(rows[b], len(rows[b].drafts), 1)[0, DRAFT] for b in sampled]
        best_B[sampled] = draw(q_BO, torch.stack(chances).to(q_BO.device))
        for b, q_O in zip(sampled, q_BO, strict=True):
            probs[b] = q_O
    return best_B.tolist(), probs


def prompt_logprobs(logits_SO: Tensor, following_S: Tensor, top: int) -> list[TokenLogprob]:
    """How likely each token was that followed, and the `top` likeliest ones, by the logits of the place before it."""
    found = []
    for part_NO, ids_N in zip(logits_SO.split(_CHUNK), following_S.split(_CHUNK), strict=True):
        found += _token_logprobs(part_NO, ids_N, top)
    return found


def _places(rows: Sequence[Row], positions: int) -> list[slice]:
    """Which positions of the logits are each row's."""
    places, start = [], 0
    for row in rows:
        end = start + len(row.drafts) + 1
        places.append(slice(start, end))
        start = end
    if start != positions:
        raise ValueError(f"logits_NO has {positions} positions; rows with their drafts need {start}")
    return places


def _is_adjusted(row: Row) -> bool:
    """Whether its logits are anything but the model's own."""
    params = row.params
    return row.allowed_TO is not None or params.adjusts or len(row.tokens) - row.prompt_length < params.min_tokens


def _adjusted(logits_TO: Tensor, row: Row) -> Tensor:
    adjusted_TO = adjust(logits_TO, row.params, row.tokens, row.prompt_length, row.drafts, row.banned_until_min)
    if row.allowed_TO is None:
        return adjusted_TO
    # A drafting module has logits for the last place alone.
    allowed_TO = row.allowed_TO[-len(logits_TO) :].to(logits_TO.device)
    return adjusted_TO.masked_fill(~allowed_TO, -math.inf)


def _distributions(sampled: Sequence[tuple[Row, Tensor]]) -> list[Tensor]:
    """What each row draws from at its positions; rows with the same filters are filtered together."""
    logits = [_adjusted(logits_TO, row) if _is_adjusted(row) else logits_TO for row, logits_TO in sampled]
    groups: dict[tuple[float, ...], list[int]] = {}
    for b, (row, _) in enumerate(sampled):
        params = row.params
        groups.setdefault((params.temperature, params.top_k, params.top_p, params.min_p), []).append(b)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        probs_NO = probabilities(torch.cat([logits[b] for b in members]), sampled[members[0]][0].params)
        found.update(zip(members, probs_NO.split([len(logits[b]) for b in members]), strict=True))
    return [found[b] for b in range(len(sampled))]


def _judge(sampled: Sequence[tuple[Row, Tensor]]) -> Accepted:
    """`accept` for all sampled rows at once: what shorter rows lack is filled with 0."""
    rows = [row for row, _ in sampled]
    target_BTO = pad_sequence(_distributions(sampled), batch_first=True)
    draft_BMO = pad_sequence([_draft_probs(row, target_BTO) for row in rows], batch_first=True)
    ids_BM = pad_sequence([torch.tensor(row.drafts, dtype=torch.int64) for row in rows], batch_first=True)
    chance_BTU = torch.stack([_uniforms(row, 0, target_BTO.shape[1]) for row in rows]).to(target_BTO.device)
    return accept(
        ids_BM.to(target_BTO.device), draft_BMO, target_BTO, chance_BTU[:, :-1, ACCEPT], chance_BTU[..., TOKEN]
    )


def _draft_probs(row: Row, like_BTO: Tensor) -> Tensor:
    """The row's (M, O), checked."""
    probs_MO = like_BTO.new_empty(0, like_BTO.shape[2]) if row.draft_probs is None else row.draft_probs
    if len(probs_MO) != len(row.drafts):
        raise ValueError(
            f"draft_probs holds {len(probs_MO)} distributions for {len(row.drafts)} drafts; "
            "each draft of a sampled row needs the one that it was drawn from"
        )
    return probs_MO


def _uniforms(row: Row, ahead: int, count: int) -> Tensor:
    """The row's random numbers for `count` positions (T, U), the first being `ahead` of its next token."""
    return uniforms(row.params.seed, [row.stream], [len(row.tokens) + ahead], count)[0]


def _with_logprobs(
    logits_NO: Tensor, rows: Sequence[Row], places: Sequence[slice], decisions: Sequence[Decision]
) -> list[Decision]:
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
