"""How often the first MTP module's draft is what the model says itself (DeepSeek-V3 report, section 5.4.3).

The share of first drafts accepted while continuing held-out prompts greedily, through the end of documents.
The report finds 85 to 90 % and 1.8 times the tokens per second. Repetitive continuations are easy to draft,
so `Evaluation.mtp_agreement`, taken on real text, belongs beside it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.transformer import Model

_ROWS = 64
"""Prompts continued at one time."""


class Acceptance(NamedTuple):
    """Drafting over many prompts."""

    drafted: int
    """Drafts made."""
    accepted: int
    """Drafts accepted."""
    tokens: int
    """Tokens generated, those of the prefill not counted."""
    forwards: int
    """Forward passes of the main model, the prefill not counted."""

    @property
    def acceptance(self) -> float:
        """The acceptance rate."""
        return self.accepted / self.drafted

    @property
    def tokens_per_forward(self) -> float:
        """Tokens per forward pass of the main model; without drafts it is 1."""
        return self.tokens / self.forwards


def draft_acceptance(model: Model, prompts: Sequence[Sequence[int]], new_tokens: int = 256) -> Acceptance:
    """Continue every prompt (token ids, at least 50 held-out ones by definition) greedily by `new_tokens`
    tokens.

    Raises ValueError for a model without MTP modules, no prompts, or `new_tokens` below 2: the prefill alone
    makes the first token, without a draft.
    """
    if not model.mtp:
        raise ValueError("num_nextn_predict_layers is 0; acceptance needs a model with at least 1 MTP module")
    if not prompts:
        raise ValueError("prompts is empty; acceptance needs at least one prompt")
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}; it must be at least 2")
    longest = max(len(prompt) for prompt in prompts) + new_tokens
    engine = Engine(model, speculative=1, max_batch=_ROWS, cache_tokens=_ROWS * (longest + 64))
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    found = [engine.submit(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    return Acceptance(
        drafted=sum(generation.drafted for generation in found),
        accepted=sum(generation.accepted for generation in found),
        tokens=sum(len(generation.token_ids) - 1 for generation in found),
        forwards=sum(generation.forwards for generation in found),
    )
