"""Speculative decoding: which drafts to accept, and how many to make.

A draft is accepted where it is the token that the main model itself samples at that position: the likeliest one, or the
one that Gumbel-max sampling draws (see sampler.py). So the output is the same, token by token, whatever was drafted,
and however much. Drafter and main model draw with the same noise from their own distributions q and p: they agree with
a probability of at least (1 − d)/(1 + d), d being half the sum of |p − q| (Daliri, Musco and Suresh, arXiv 2408.07978).
The rule of Leviathan et al. (arXiv 2211.17192) reaches 1 − d, but there the samples depend on the drafts.
The best number of drafts depends on acceptance and on the cost of a step: `DraftLength` measures both.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


def accept(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts are accepted: those before the first that differs from what the model sampled."""
    count = 0
    for token, own in zip(drafts, chosen, strict=False):
        if token != own:
            break
        count += 1
    return count


_PRIOR_RATE, _PRIOR_WEIGHT = 0.7, 2.0
"""The prior: this acceptance rate, weighted as so many trials."""

_HALF_LIFE = 64
"""Trials after which an earlier one counts half."""

_FIRST_TRIALS = 3
"""Steps of a new length before its cost counts as known: the median of three survives one slow step."""

_COSTS_KEPT = 15
"""Latest steps whose median is the cost of a length."""

_FIRST_WAIT, _SHORTEST_WAIT, _LONGEST_WAIT = 16, 64, 1024
"""Steps between two trials of a length that is not the best: at first, after a change, and at most."""

_UNPROFITABLE_WAIT = 256
"""Interval between two trials from which on drafts whose cost alone rules them out are unprofitable."""


@dataclass
class _Costs:
    """Costs of steps of about the same batch size, by drafts per request, and when to try another length again."""

    latest: list[deque[float]]
    typical: list[float]
    """Their medians, recomputed at once after a trial, else when all of the latest are new."""
    uncounted: list[int]
    """Steps since then."""
    waited: int = 0
    """Steps at the best length since another was tried."""
    wait: int = _FIRST_WAIT
    turn: int = 0
    """Which of the other lengths is tried next."""
    best: int | None = None
    """The most profitable length; None: to be determined again, since costs have changed."""

    def known(self, drafts: int) -> bool:
        return len(self.latest[drafts]) >= _FIRST_TRIALS

    def add(self, drafts: int, seconds: float, after_wait: bool) -> None:
        latest = self.latest[drafts]
        while after_wait and len(latest) >= _FIRST_TRIALS:
            # Old by now: two trials that agree outvote what is left.
            latest.popleft()
        latest.append(seconds)
        self.uncounted[drafts] += 1
        if after_wait or len(latest) <= _FIRST_TRIALS or self.uncounted[drafts] >= _COSTS_KEPT:
            self.typical[drafts], self.uncounted[drafts] = median(latest), 0
            self.best = None


class DraftLength:
    """How many drafts to make per step: most expected tokens per second from measured acceptance and measured costs.

    A step with n drafts per request yields 1 + Σ_{k≤n} Π_{i≤k} a_i tokens per request, a_i being the probability that
    the i-th draft is accepted after the ones before. Lengths are measured upwards from 0 until one more is slower.
    Later the neighbours of the best length, and 0, are tried again, since texts and costs change and an engine's first
    steps are slow: one step each, at intervals that double while nothing improves; only a trial that was faster is
    repeated at once. Everything is deterministic given what was recorded.
    """

    def __init__(self, most: int) -> None:
        """`most`: drafts per request and step at most; 0 never drafts."""
        self.most = most
        self._offered, self._accepted = [0.0] * most, [0.0] * most
        self._costs: dict[int, _Costs] = {}

    def choose(self, batch: int) -> int:
        """Drafts per request for a step of `batch` requests, 0 to `most`."""
        costs = self._costs_of(batch)
        best = self._best(costs)
        for drafts in range(min(best + 1, self.most) + 1):
            if not costs.known(drafts):
                return drafts
        if costs.waited < costs.wait or self.most == 0:
            return best
        others = [n for n in (best + 1, best - 1, 0) if 0 <= n <= self.most and n != best]
        return others[costs.turn % len(others)]

    def record(self, batch: int, accepted_at: Sequence[int], seconds: float) -> None:
        """Record a step of `batch` requests with len(accepted_at) drafts each: `accepted_at[k]` of them had their first
        k + 1 accepted, and drafting and verifying took `seconds`."""
        drafts, costs = len(accepted_at), self._costs_of(batch)
        best = self._best(costs)
        again = costs.known(drafts) and drafts != best
        costs.add(drafts, seconds, again)
        paid = again and (
            self._tokens(drafts) * costs.typical[best] > self._tokens(best) * seconds
            or (drafts > best and self._paid(costs, best, drafts, accepted_at[-1], batch))
        )
        self._count(batch, accepted_at, best)
        if self._best(costs) != best:
            costs.waited, costs.wait = 0, min(costs.wait, _SHORTEST_WAIT)
        elif paid:
            costs.waited = costs.wait = min(costs.wait, _SHORTEST_WAIT)
        elif again:
            costs.waited, costs.wait, costs.turn = 0, min(2 * costs.wait, _LONGEST_WAIT), costs.turn + 1
        else:
            costs.waited += 1

    def is_unprofitable(self, batch: int) -> bool:
        """Whether a draft has long cost steps of `batch` requests more than it would gain if always accepted.

        This must also hold for all other batch sizes for which the cost of a draft is known.
        """
        if self.most == 0 or self._costs_of(batch).wait < _UNPROFITABLE_WAIT:
            return False
        tried = [costs for costs in self._costs.values() if costs.known(1)]
        return all(costs.typical[1] >= 2 * costs.typical[0] for costs in tried)

    def _costs_of(self, batch: int) -> _Costs:
        """One record for 1 request, 2, 3 to 4, 5 to 8, and so on."""
        bucket = (batch - 1).bit_length()
        if bucket not in self._costs:
            latest: list[deque[float]] = [deque(maxlen=_COSTS_KEPT) for _ in range(self.most + 1)]
            self._costs[bucket] = _Costs(latest, [0.0] * (self.most + 1), [0] * (self.most + 1))
        return self._costs[bucket]

    def _best(self, costs: _Costs) -> int:
        """The length of most tokens per second among those whose costs are known; the shortest of equals."""
        if costs.best is None:
            known = [drafts for drafts in range(self.most + 1) if costs.known(drafts)]
            costs.best = max(known, key=lambda drafts: self._tokens(drafts) / costs.typical[drafts], default=0)
        return costs.best

    def _tokens(self, drafts: int) -> float:
        """Expected tokens per request and step."""
        tokens = probability = 1.0
        for offered, accepted in zip(self._offered[:drafts], self._accepted[:drafts], strict=True):
            probability *= (accepted + _PRIOR_RATE * _PRIOR_WEIGHT) / (offered + _PRIOR_WEIGHT)
            tokens += probability
        return tokens

    def _paid(self, costs: _Costs, best: int, drafts: int, accepted: int, offered: int) -> bool:
        """Whether this one step's acceptance of the draft beyond the best length was worth its typical cost."""
        tokens = self._tokens(best)
        return (tokens * offered + accepted) * costs.typical[best] > tokens * offered * costs.typical[drafts]

    def _count(self, offered: int, accepted_at: Sequence[int], best: int) -> None:
        """Count a step's acceptance: each draft's among the requests that accepted the ones before."""
        for place, accepted in enumerate(accepted_at):
            # Counts of drafts beyond the best length are old: each new one halves them.
            kept = 0.5 if place >= best else 0.5 ** (offered / _HALF_LIFE)
            self._offered[place] = kept * self._offered[place] + offered
            self._accepted[place] = kept * self._accepted[place] + accepted
            offered = accepted
        if accepted_at:
            for costs in self._costs.values():
                costs.best = None
