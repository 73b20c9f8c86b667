"""From one step's logits to tokens, for requests with their own parameters and their own numbers of drafts.

A request that verifies M drafts has M + 1 consecutive positions of logits: after its last token, after draft 1, and
so on. At each position the drafts before it count as output, for penalties and min_tokens. A draft is accepted when it
is the token sampled from the position's own logits. Requests without drafts are the case M = 0. The usual step, all
greedy and without logits processors, costs one argmax and one transfer.

Shapes: B requests, N positions of all requests, T positions of one, M drafts, S prompt tokens, O vocabulary, X ids.
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
"""Prompt positions whose log-probabilities are in memory at a time."""


class Constraint(Protocol):
    """Restricts what a request may generate, for example to a grammar."""

    def allowed(self, drafts: Sequence[int]) -> Tensor:
        """The ids that may follow the output so far, and those that may follow each draft: bool (M + 1, O).

        Rows behind a draft that is not allowed itself do not matter. The state does not change.
        """

    def take(self, tokens: Sequence[int]) -> None:
        """Advance: these tokens were generated."""


@dataclass
class SamplingState:
    """What sampling needs of one request in a step."""

    params: SamplingParams
    stream: int
    """Second key of its noise, such as the prompt's place among a call's prompts."""
    tokens: Sequence[int]
    """The prompt and the output so far."""
    prompt_length: int
    banned_until_min: tuple[int, ...] = ()
    """Ids that cannot be sampled before min_tokens: stop ids, and EOS unless it is ignored."""
    drafts: list[int] = field(default_factory=list)
    """Tokens to be verified in this step."""
    allowed_TO: Tensor | None = None
    """What may be sampled after the tokens and after each draft, (M + 1, O) bool; None: anything."""
    report: bool = False
    """Report what each token was sampled from."""


class TokenLogprob(NamedTuple):
    """A token's log-probability by the model's own logits, before any processing."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    top: list[tuple[int, float]]
    """The likeliest ids with their log-probabilities, likeliest first."""


class SampledFrom(NamedTuple):
    """The distribution that a token was sampled from, after temperature, filters and all other processing."""

    logprob: float
    """Of the token."""
    kept_ids: Tensor | None
    """What top-k, top-p and min-p kept, int32; None where none of them is set."""


class SampledTokens(NamedTuple):
    """One request's new tokens of a step."""

    tokens: list[int]
    """The accepted drafts, then one more token."""
    accepted: int
    """How many of them were drafts."""
    logprobs: list[TokenLogprob] | None
    """One for each of `tokens`, where requested."""
    error: str | None = None
    """Why the one more token is missing."""
    sampled_from: list[SampledFrom] | None = None
    """One for each of `tokens`, where requested."""


def verify(logits_NO: Tensor, rows: Sequence[SamplingState], absent_X: Tensor | None = None) -> list[SampledTokens]:
    """Sample each request's next tokens from its 1 + len(drafts) consecutive positions of logits, in order.

    `absent_X`: ids that no token has, which are never sampled; reported log-probabilities are the model's all the same.
    Raises ValueError if there are more or fewer positions than the requests with their drafts need.
    """
    places = _places(rows, len(logits_NO))
    present_NO = logits_NO if absent_X is None else logits_NO.index_fill(1, absent_X, -torch.inf)
    best_N = _checked(_likeliest(present_NO), present_NO)
    sampled = []
    for row, place in zip(rows, places, strict=True):
        if row.params.temperature > 0:
            sampled.append((row, place))
        elif _changes_logits(row):
            processed_TO = _processed(present_NO[place], row)
            best_N[place] = _checked(processed_TO.argmax(-1), processed_TO)
    probs_NO = None
    if sampled:
        drawn_N, probs_NO = _drawn([(row, present_NO[place], 0) for row, place in sampled])
        drawn_N = _checked(drawn_N, probs_NO)
        best_N[torch.cat([torch.arange(place.start, place.stop) for _, place in sampled]).to(best_N.device)] = drawn_N
    chosen = best_N.tolist()  # the call's one transfer to the host, but for log-probabilities
    results = []
    for row, place in zip(rows, places, strict=True):
        count = accept(row.drafts, chosen[place])
        last = place.start + count
        if chosen[last] >= 0:
            results.append(SampledTokens(chosen[place.start : last + 1], count, None))
        else:
            results.append(SampledTokens(chosen[place.start : last], count, None, _why_none(logits_NO[last])))
    if probs_NO is not None and any(row.report for row in rows):
        results = _with_distributions(probs_NO, rows, results)
    if any(row.params.logprobs is not None for row in rows):
        return _with_logprobs(logits_NO, rows, places, results)
    return results


def draft(logits_BO: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """One more draft per request, from the MTP module's logits at the position after `tokens` and `drafts`.

    The logits are processed, and sampled from, exactly as the main model's will be at that position.
    """
    best_B = _likeliest(logits_BO)
    sampled = [b for b, row in enumerate(rows) if row.params.temperature > 0]
    for b, row in enumerate(rows):
        if row.params.temperature == 0 and _changes_logits(row):
            best_B[b] = _processed(logits_BO[b : b + 1], row)[0].argmax()
    if sampled:
        best_B[sampled], _ = _drawn([(rows[b], logits_BO[b : b + 1], len(rows[b].drafts)) for b in sampled])
    # Not `_checked`: where no token can be sampled any will do, as it is not accepted.
    return best_B.tolist()


def prompt_logprobs(logits_SO: Tensor, following_S: Tensor, top: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that followed, and of the `top` likeliest ones, by the logits before them."""
    found = []
    for part_NO, ids_N in zip(logits_SO.split(_CHUNK), following_S.split(_CHUNK), strict=True):
        found += _token_logprobs(part_NO, ids_N, top)
    return found


def _likeliest(logits_NO: Tensor) -> Tensor:
    """The first of the likeliest tokens at each position, (N)."""
    if logits_NO.device.type == "cpu":
        # Some ten times as fast as torch's argmax, which takes as long as a small model's whole step.
        return torch.from_numpy(at_least_float32(logits_NO).numpy().argmax(-1))
    return logits_NO.argmax(-1)


def _checked(ids_N: Tensor, values_NO: Tensor) -> Tensor:
    """The chosen ids; −1 where the logit or the probability that won is not finite, so that none could be chosen."""
    if ids_N.device.type != "cpu":
        return ids_N.where(values_NO.gather(1, ids_N[:, None])[:, 0].isfinite(), -1)
    # A few look-ups from Python take less than any operation on tensors.
    values = at_least_float32(values_NO).numpy()
    for n, token in enumerate(ids_N.tolist()):
        if not math.isfinite(values.item(n, token)):
            ids_N[n] = -1
    return ids_N


def _why_none(logits_O: Tensor) -> str:
    """Why no token can be sampled from the model's logits of one position."""
    if not logits_O.amax().isfinite():
        return "the model's logits are not finite numbers: its weights are damaged, or its activations overflow"
    return (
        "no token can be sampled: before min_tokens neither EOS nor stop_ids, and with a constraint only what it allows"
    )


def _places(rows: Sequence[SamplingState], positions: int) -> list[slice]:
    """Which positions of the logits are each request's."""
    places, start = [], 0
    for row in rows:
        end = start + len(row.drafts) + 1
        places.append(slice(start, end))
        start = end
    if start != positions:
        raise ValueError(f"logits_NO has {positions} positions; the requests with their drafts need {start}")
    return places


def _changes_logits(row: SamplingState) -> bool:
    """Whether its logits differ from the model's own."""
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
    # The MTP module has logits for the last position alone.
    allowed_TO = row.allowed_TO[-len(logits_TO) :].to(logits_TO.device)
    return adjusted_TO.masked_fill(~allowed_TO, -math.inf)


def _distributions(sampled: Sequence[tuple[SamplingState, Tensor]]) -> list[Tensor]:
    """The distributions at each request's positions; requests with the same filters are filtered together."""
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


def _drawn(sampled: Sequence[tuple[SamplingState, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """The tokens (N) sampled at all positions of some requests, each with its logits (T, O) and how many positions
    after its next token these begin; and the distributions (N, O) they were drawn from."""
    probs_NO = torch.cat(_distributions([(row, logits_TO) for row, logits_TO, _ in sampled]))
    noise = [
        exponential_noise(row.params.seed, row.stream, len(row.tokens) + ahead + place, logits_TO.shape[1])
        for row, logits_TO, ahead in sampled
        for place in range(len(logits_TO))
    ]
    return draw(probs_NO, torch.stack(noise).to(probs_NO.device)), probs_NO


def _with_distributions(
    probs_NO: Tensor, rows: Sequence[SamplingState], results: Sequence[SampledTokens]
) -> list[SampledTokens]:
    """The results with what tokens were sampled from; `probs_NO` has the positions of all requests that sample."""
    found, start = [], 0
    for row, result in zip(rows, results, strict=True):
        if row.params.temperature > 0:
            own_TO = probs_NO[start : start + len(result.tokens)]
            start += len(row.drafts) + 1
            if row.report:
                ids_T1 = torch.tensor(result.tokens, dtype=torch.int64, device=own_TO.device)[:, None]
                logprobs = own_TO.gather(1, ids_T1)[:, 0].log().tolist()
                kept = [p_O.nonzero()[:, 0].int().cpu() if row.params.filters else None for p_O in own_TO]
                result = result._replace(sampled_from=list(map(SampledFrom, logprobs, kept)))
        found.append(result)
    return found


def _with_logprobs(
    logits_NO: Tensor, rows: Sequence[SamplingState], places: Sequence[slice], results: Sequence[SampledTokens]
) -> list[SampledTokens]:
    """The results with log-probabilities where requests ask for them, all computed at once."""
    asking = [(r, row.params.logprobs) for r, row in enumerate(rows) if row.params.logprobs is not None]
    positions = [places[r].start + i for r, _ in asking for i in range(len(results[r].tokens))]
    tokens = [token for r, _ in asking for token in results[r].tokens]
    ids_N = torch.tensor(tokens, dtype=torch.int64, device=logits_NO.device)
    facts = iter(_token_logprobs(logits_NO[positions], ids_N, max(top for _, top in asking)))
    found = list(results)
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
