"""From logits to a token: one request's sampling parameters, what they do to the logits, and undisturbed draws.

Logits are processed in this order: logit_bias; the penalties, repetition first, then presence and frequency; the
ban of what would end the text before min_tokens; and, where tokens are drawn, temperature, top-k, top-p and
min-p as in `transformers`. Greedy decoding takes the largest logit after the ban.

A token is drawn by a race: every token i of the vocabulary gets an exponential random number, and the one with the
smallest number over its probability wins, which it does with just that probability. The numbers are counter-based, a
function of (seed, sequence, position) alone: what is drawn depends neither on the other sequences of a batch, nor on
when it was drawn, nor on what was drafted. A drafting module that runs the same race mostly has the same winner.

Shapes: B rows, N positions, T positions of one row, O vocabulary, K likeliest tokens, X ids.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fathom.model.layers import at_least_float32

_COOLEST = 1e-5
"""Smallest temperature but 0: below it, quotients of logits would leave float32."""

_CANDIDATES = 256
"""Likeliest tokens among which top-p looks for its border before it sorts the vocabulary."""

_MOST_LOGPROBS = 20
"""Likeliest tokens that may be reported beside each one, as in OpenAI's protocol."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen, when it ends and what is reported of it. The defaults are greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 always takes the likeliest token, whatever the filters say."""
    top_k: int = 0
    """Only the k likeliest tokens stay, and any that tie with the last of them; 0: all stay."""
    top_p: float = 1.0
    """Of what top_k left, renormalised: only the fewest likeliest tokens that reach this sum stay, and any that
    tie with the last of them."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest stay."""
    repetition_penalty: float = 1.0
    """Tokens that occur in the prompt or the output: positive logits are divided by it, negative multiplied."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit once for every time it occurs in the output."""
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these ids."""
    seed: int = 0
    """Every draw is a function of it and of the token's place."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end the output, beside the end-of-text token."""
    stop: Sequence[str] = ()
    """Strings that end the output where the first of them is complete; the text is cut before it."""
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    max_tokens: int = 256
    """The output's length at most."""
    min_tokens: int = 0
    """Until the output is this long, nothing that would end it can be chosen."""
    logprobs: int | None = None
    """Report each output token's log-probability and this many of the likeliest ones at its place, all by the
    model's own logits, before any processing; without it, none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or _COOLEST <= self.temperature < math.inf
        _check(warm, "temperature", self.temperature, f"0 (greedy), or a number from {_COOLEST} up")
        _check(_whole(self.top_k, 0), "top_k", self.top_k, "an integer of at least 1, or 0 for no limit")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1: no limit)")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (no limit) to 1")
        strong = 0 < self.repetition_penalty < math.inf
        _check(strong, "repetition_penalty", self.repetition_penalty, "a number above 0 (1: no penalty)")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2 (0: no penalty)")
        biased = all(_whole(token, 0) and -100 <= bias <= 100 for token, bias in self.logit_bias.items())
        _check(biased, "logit_bias", self.logit_bias, "token ids, each with a number from -100 to 100")
        _check(_whole(self.seed, 0, 2**64 - 1), "seed", self.seed, "an integer from 0 to 2**64 − 1")
        ids = isinstance(self.stop_ids, tuple) and all(_whole(token, 0) for token in self.stop_ids)
        _check(ids, "stop_ids", self.stop_ids, "a tuple of token ids")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        _check(_non_empty_strings(stops), "stop", self.stop, "a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(stops))
        _check(_whole(self.max_tokens, 1), "max_tokens", self.max_tokens, "an integer of at least 1")
        fits = _whole(self.min_tokens, 0, self.max_tokens)
        _check(fits, "min_tokens", self.min_tokens, f"an integer from 0 to max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            right = count is None or _whole(count, 0, _MOST_LOGPROBS)
            _check(right, name, count, f"an integer from 0 to {_MOST_LOGPROBS}, or None for no log-probabilities")

    @property
    def changes_logits(self) -> bool:
        """Whether `apply_logits_processors` may change logits beyond the ban before min_tokens."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalised or bool(self.logit_bias)


def check_against(params: SamplingParams, vocab_size: int) -> None:
    """Raises ValueError for ids that the vocabulary does not have."""
    named = {"logit_bias": params.logit_bias, "stop_ids": params.stop_ids}
    for name, ids in named.items():
        for token in ids:
            if token >= vocab_size:
                raise ValueError(f"{name} names token {token}; ids must be below vocab_size ({vocab_size})")


def apply_logits_processors(
    logits_TO: Tensor,
    params: SamplingParams,
    tokens: Sequence[int],
    prompt_length: int,
    drafts: Sequence[int],
    banned: Sequence[int],
) -> Tensor:
    """The logits after bias, penalties and ban: a new tensor of at least float32.

    `tokens` are the prompt and the output so far, `drafts` would follow them. The positions are consecutive and
    the last one comes after all drafts; those before it have seen fewer, to each draft its own history.
    `banned` ids are impossible while the output, drafts included, is shorter than min_tokens.
    """
    logits_TO = logits_TO.to(torch.promote_types(logits_TO.dtype, torch.float32), copy=True)
    if params.logit_bias:
        logits_TO[:, list(params.logit_bias)] += logits_TO.new_tensor(list(params.logit_bias.values()))
    # Each draft with the first position that comes after it.
    first_has = len(drafts) + 1 - len(logits_TO)
    drafted = [(max(place - first_has, 0), token) for place, token in enumerate(drafts, start=1)]
    if params.repetition_penalty != 1:
        _penalise_repetition(logits_TO, params.repetition_penalty, set(tokens), drafted)
    if params.presence_penalty or params.frequency_penalty:
        _penalise_output(logits_TO, params, Counter(tokens[prompt_length:]), drafted)
    missing = params.min_tokens - (len(tokens) - prompt_length + first_has)
    if banned and missing > 0:
        logits_TO[:missing, list(banned)] = -torch.inf
    return logits_TO


def _penalise_repetition(logits_TO: Tensor, factor: float, seen: set[int], drafted: list[tuple[int, int]]) -> None:
    """In place; touches no more of the vocabulary than what was seen."""
    weakened = [(0, list(seen))]
    for start, token in drafted:
        if token not in seen:
            seen.add(token)
            weakened.append((start, [token]))
    for start, ids in weakened:
        values_TX = logits_TO[start:, ids]
        logits_TO[start:, ids] = torch.where(values_TX > 0, values_TX / factor, values_TX * factor)


def _penalise_output(
    logits_TO: Tensor, params: SamplingParams, counts: Counter[int], drafted: list[tuple[int, int]]
) -> None:
    """Presence and frequency, in place."""
    # A draft starts from the unpenalised values: taking off in two parts would round unlike plain decoding.
    free_TM = logits_TO[:, [token for _, token in drafted]]
    amounts = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
    logits_TO[:, list(counts)] -= logits_TO.new_tensor(amounts)
    for place, (start, token) in enumerate(drafted):
        counts[token] += 1
        amount = params.presence_penalty + params.frequency_penalty * counts[token]
        logits_TO[start:, token] = free_TM[start:, place] - amount


def probabilities(logits_BO: Tensor, params: SamplingParams) -> Tensor:
    """The distribution tokens are drawn from, (B, O) float32; greedy: 1 for the likeliest token, else 0.

    Temperature and filters alone: bias, penalties and ban are `apply_logits_processors`'s.
    """
    if params.temperature == 0:
        best_B1 = logits_BO.argmax(-1, keepdim=True)
        return torch.zeros_like(logits_BO, dtype=torch.float32).scatter_(1, best_B1, 1.0)
    # With the largest logit at 0 no temperature can overflow.
    logits_BO = at_least_float32(logits_BO)
    logits_BO = (logits_BO - logits_BO.amax(-1, keepdim=True)).div_(params.temperature)
    if 0 < params.top_k < logits_BO.shape[1]:
        worst_B1 = logits_BO.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BO.masked_fill_(logits_BO < worst_B1, -torch.inf)
    probs_BO = logits_BO.softmax(-1)
    if params.top_p < 1:
        probs_BO.masked_fill_(probs_BO < _top_p_border(probs_BO, params.top_p), 0)
    if params.min_p > 0:
        probs_BO.masked_fill_(probs_BO < params.min_p * probs_BO.amax(-1, keepdim=True), 0)
    if params.top_p < 1 or params.min_p > 0:
        probs_BO.div_(probs_BO.sum(-1, keepdim=True))
    return probs_BO.float()


def _top_p_border(probs_BO: Tensor, top_p: float) -> Tensor:
    """The smallest probability that top-p keeps, (B, 1).

    Sorting a whole vocabulary takes far longer than finding its likeliest tokens, and those nearly always reach
    top_p. A border that is a probability, not a place in an order, is the same whichever way it was found.
    """
    likeliest_BK = probs_BO.topk(min(_CANDIDATES, probs_BO.shape[1]), dim=-1).values
    border_B, reached_B = _border_among(likeliest_BK, top_p)
    if not reached_B.all():
        flat_B = ~reached_B
        border_B[flat_B], _ = _border_among(probs_BO[flat_B].sort(dim=-1, descending=True).values, top_p)
    return border_B[:, None]


def _border_among(sorted_BK: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The first of the falling probabilities with which their sum reaches top_p (else the last); whether it does."""
    # Sums of whole numbers below 2**53 are exact, so they depend neither on their length nor on their order.
    whole_BK = (sorted_BK.double() * 2**52).round()
    short_B = (whole_BK.cumsum(-1) < top_p * 2**52).sum(-1)
    last = sorted_BK.shape[1] - 1
    return sorted_BK.gather(1, short_B.clamp_max(last)[:, None])[:, 0], short_B <= last


def draw(probs_NO: Tensor, numbers_NO: Tensor) -> Tensor:
    """The winners (N) of the races with these numbers; probabilities need not sum to 1, and 0 never wins."""
    return (numbers_NO / probs_NO).masked_fill_(probs_NO <= 0, torch.inf).argmin(-1)


def exponential_noise(seed: int, sequence: int, position: int, size: int) -> Tensor:
    """The exponential random numbers of one position: (O) float32 for a vocabulary of `size`."""
    # Philox's counter has four words: the lowest counts the numbers of one position.
    generator = np.random.Philox(key=np.array([seed, sequence], dtype=np.uint64), counter=[0, position, 0, 0])
    # Drawn in float64: in float32 one number in 2**23 is 0, which wins whatever its token's probability.
    return torch.from_numpy(np.random.Generator(generator).standard_exponential(size)).float()


def _check(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} is {value!r}; it must be {expected}")


def _non_empty_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value)


def _whole(value: object, low: int, high: float = math.inf) -> bool:
    # bool is an int to Python, but True is no count.
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
