"""From logits to a token: one request's sampling parameters, the logits processors, and counter-based sampling.

Logits are processed in this order: logit_bias; the penalties, repetition first, then presence and frequency; the mask
of stop tokens before min_tokens; and, for sampling, temperature, top-k, top-p and min-p as in `transformers`. Greedy
decoding takes the argmax of the masked logits.

Tokens are sampled by an exponential race, which is the Gumbel-max trick: every token i of the vocabulary gets
exponential noise, and the one with the smallest noise over its probability wins, which it does with exactly that
probability. The noise is counter-based, a function of (seed, stream, position) alone: what is sampled depends neither
on the other sequences of a batch, nor on time, nor on drafts. An MTP module that draws with the same noise mostly draws
the same token.

Shapes: B rows, N positions, T positions of one row, O vocabulary, K likeliest tokens, X ids.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fathom.config import check
from fathom.engine.config import is_int
from fathom.model.layers import at_least_float32

_COOLEST = 1e-5
"""Smallest temperature but 0: below it, scaled logits would overflow float32."""
_STRONGEST = 1e4
"""Largest repetition penalty, and one over the smallest: beyond it, penalised logits would overflow."""

_CANDIDATES = 256
"""Likeliest tokens among which the threshold of top-p is searched before the whole vocabulary is sorted."""

_MOST_LOGPROBS = 20
"""Limit of `logprobs`, as in OpenAI's protocol."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are sampled, when it ends and what is reported of it. The defaults are greedy."""

    temperature: float = 0.0
    """Logits are divided by it; 0 is greedy decoding, which ignores the filters below."""
    top_k: int = 0
    """Keep the k likeliest tokens, and any that tie with the last of them; 0: keep all."""
    top_p: float = 1.0
    """Of what top_k keeps, renormalised: keep the fewest likeliest tokens whose probabilities sum to this, and any that
    tie with the last of them."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """For tokens in the prompt or the output: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it occurs in the output."""
    logit_bias: dict[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these ids."""
    seed: int = 0
    """Every sample is a function of it, of the request's stream and of the position."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides EOS."""
    stop: Sequence[str] = ()
    """Strings that end the output where the first of them is complete; the text is cut before it."""
    ignore_eos: bool = False
    """Continue after EOS."""
    max_tokens: int = 256
    """Maximal length of the output."""
    min_tokens: int = 0
    """Until the output is this long, neither EOS nor `stop_ids` can be sampled; stop strings end it all the same."""
    logprobs: int | None = None
    """Report the log-probability of each output token and of this many of the likeliest ones at its position, all by
    the model's own logits, before any processing; None: report none."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""

    def __post_init__(self) -> None:
        warm = self.temperature == 0 or _COOLEST <= self.temperature < math.inf
        check(warm, "temperature", self.temperature, f"0 (greedy), or a number from {_COOLEST} up")
        check(is_int(self.top_k, 0), "top_k", self.top_k, "an integer of at least 1, or 0 for no limit")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (1: no limit)")
        check(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (no limit) to 1")
        strong = 1 / _STRONGEST <= self.repetition_penalty <= _STRONGEST
        expected = f"a number from {1 / _STRONGEST} to {_STRONGEST:g} (1: no penalty)"
        check(strong, "repetition_penalty", self.repetition_penalty, expected)
        for name in ("presence_penalty", "frequency_penalty"):
            check(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "from -2 to 2 (0: no penalty)")
        biased = all(is_int(token, 0) and -100 <= bias <= 100 for token, bias in self.logit_bias.items())
        check(biased, "logit_bias", self.logit_bias, "token ids, each with a number from -100 to 100")
        check(is_int(self.seed, 0, 2**64 - 1), "seed", self.seed, "an integer from 0 to 2**64 − 1")
        ids = isinstance(self.stop_ids, tuple) and all(is_int(token, 0) for token in self.stop_ids)
        check(ids, "stop_ids", self.stop_ids, "a tuple of token ids")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        check(_non_empty_strings(stops), "stop", self.stop, "a string or a list of strings, none of them empty")
        object.__setattr__(self, "stop", tuple(stops))
        check(is_int(self.max_tokens, 1), "max_tokens", self.max_tokens, "an integer of at least 1")
        fits = is_int(self.min_tokens, 0, self.max_tokens)
        check(fits, "min_tokens", self.min_tokens, f"an integer from 0 to max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            right = count is None or is_int(count, 0, _MOST_LOGPROBS)
            check(right, name, count, f"an integer from 0 to {_MOST_LOGPROBS}, or None for no log-probabilities")

    @property
    def filters(self) -> bool:
        """Whether some tokens may not be kept."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """Whether `apply_logits_processors` may change logits beyond the mask before min_tokens."""
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
    """The logits after bias, penalties and mask: a new tensor of at least float32.

    `tokens` are the prompt and the output so far, `drafts` would follow them. The T positions are consecutive and the
    last one comes after all drafts; each one's history ends before it. `banned` ids are masked while the output,
    drafts included, is shorter than min_tokens.
    """
    logits_TO = logits_TO.to(torch.promote_types(logits_TO.dtype, torch.float32), copy=True)
    if params.logit_bias:
        logits_TO[:, list(params.logit_bias)] += logits_TO.new_tensor(list(params.logit_bias.values()))
    # Each draft with the first position behind it.
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
    """In place; touches only the logits of tokens that occurred."""
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
    # A draft starts from the unpenalised values: subtracting in two parts would round unlike plain decoding.
    free_TM = logits_TO[:, [token for _, token in drafted]]
    amounts = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
    logits_TO[:, list(counts)] -= logits_TO.new_tensor(amounts)
    for place, (start, token) in enumerate(drafted):
        counts[token] += 1
        amount = params.presence_penalty + params.frequency_penalty * counts[token]
        logits_TO[start:, token] = free_TM[start:, place] - amount


def probabilities(logits_BO: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that is sampled from, (B, O) float32; greedy: 1 for the likeliest token, else 0.

    Temperature and filters alone; `apply_logits_processors` comes before.
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
        probs_BO.masked_fill_(probs_BO < _top_p_threshold(probs_BO, params.top_p), 0)
    if params.min_p > 0:
        probs_BO.masked_fill_(probs_BO < params.min_p * probs_BO.amax(-1, keepdim=True), 0)
    if params.top_p < 1 or params.min_p > 0:
        probs_BO.div_(probs_BO.sum(-1, keepdim=True))
    return probs_BO.float()


def _top_p_threshold(probs_BO: Tensor, top_p: float) -> Tensor:
    """The smallest probability that top-p keeps, (B, 1).

    Sorting a whole vocabulary takes far longer than finding its likeliest tokens, and those nearly always reach
    top_p. A threshold that is a probability, not a rank, is the same whichever way it was found.
    """
    likeliest_BK = probs_BO.topk(min(_CANDIDATES, probs_BO.shape[1]), dim=-1).values
    threshold_B, reached_B = _threshold_among(likeliest_BK, top_p)
    if not reached_B.all():
        flat_B = ~reached_B
        threshold_B[flat_B], _ = _threshold_among(probs_BO[flat_B].sort(dim=-1, descending=True).values, top_p)
    return threshold_B[:, None]


def _threshold_among(sorted_BK: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The first of the descending probabilities with which their sum reaches top_p, else the last; whether it does."""
    # Sums of integers below 2**53 are exact in float64, so they depend neither on their length nor on their order.
    whole_BK = (sorted_BK.double() * 2**52).round()
    short_B = (whole_BK.cumsum(-1) < top_p * 2**52).sum(-1)
    last = sorted_BK.shape[1] - 1
    return sorted_BK.gather(1, short_B.clamp_max(last)[:, None])[:, 0], short_B <= last


def draw(probs_NO: Tensor, noise_NO: Tensor) -> Tensor:
    """The tokens (N) drawn with this exponential noise; probabilities need not sum to 1, and 0 never wins."""
    return (noise_NO / probs_NO).masked_fill_(probs_NO <= 0, torch.inf).argmin(-1)


def exponential_noise(seed: int, stream: int, position: int, size: int) -> Tensor:
    """The noise of one position: (O) float32 for a vocabulary of `size`."""
    # Philox's counter has four words; the lowest counts within one position.
    generator = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=[0, position, 0, 0])
    # Drawn in float64: in float32 one value in 2**23 is 0, which wins whatever its token's probability.
    return torch.from_numpy(np.random.Generator(generator).standard_exponential(size)).float()


def _non_empty_strings(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) and each for each in value)
