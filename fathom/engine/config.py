"""How an engine runs: batch and cache sizes, budgets, drafting."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from fathom.config import check

_MAX_DRAFTS = 16
"""Drafts per step that `speculative` may fix."""

_PREFILL_BUDGETS = {"cpu": 512, "cuda": 2048}
"""Default prefill tokens per step by device: fewer do not keep a GPU busy."""

_USUAL_LENGTH = 4096
"""Tokens per sequence the cache has room for by default; longer sequences use the room of others."""


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine; each is also a keyword of `Engine`."""

    speculative: bool | int = True
    """True: the first MTP module drafts as many tokens as measured acceptance and cost make profitable; a number fixes
    the drafts per step; False or 0: plain decoding."""
    max_batch: int = 32
    """Requests that run concurrently; the others wait."""
    page_size: int = 64
    """Tokens per page of the latent cache."""
    cache_tokens: int | None = None
    """Tokens the latent cache has room for; None: 4096 for each of `max_batch`, and at least the model's length."""
    prefill_budget: int | None = None
    """Prefill tokens per step while others decode, which bounds how long those wait; None: 512, on a GPU 2048."""
    max_waiting: int | None = None
    """Requests that may wait; `submit` raises QueueFull beyond that. None: no limit."""
    eager: bool = False
    """Plain torch alone, without compiled kernels or CUDA graphs."""

    def __post_init__(self) -> None:
        right = isinstance(self.speculative, bool) or is_int(self.speculative, 0, _MAX_DRAFTS)
        check(right, "speculative", self.speculative, f"True, False or a number of drafts up to {_MAX_DRAFTS}")
        for name in ("max_batch", "page_size"):
            check(is_int(getattr(self, name), 1), name, getattr(self, name), "an integer of at least 1")
        # A request has at least one token of prompt and one of output.
        for name, least in (("cache_tokens", 2), ("prefill_budget", 1), ("max_waiting", 1)):
            value = getattr(self, name)
            check(value is None or is_int(value, least), name, value, f"None or an integer of at least {least}")
        check(isinstance(self.eager, bool), "eager", self.eager, "True or False")

    @property
    def fixed_drafts(self) -> int | None:
        """Drafts per step; None where their number adapts."""
        return None if self.speculative is True else int(self.speculative)

    def prefill_tokens(self, device_type: str) -> int:
        """Prefill tokens per step while others decode."""
        return self.prefill_budget or _PREFILL_BUDGETS[device_type]

    def pages(self, max_length: int) -> int:
        """Pages of the cache for a model of this maximal length."""
        tokens = self.cache_tokens
        if tokens is None:
            tokens = max(max_length, self.max_batch * min(max_length, _USUAL_LENGTH))
        # Pages are shared whole, so a sequence may need up to one page beyond its length.
        return -(-tokens // self.page_size)


def merged(config: EngineConfig | None, overrides: dict[str, Any]) -> EngineConfig:
    """`config`, or the default one, with some fields replaced. Raises ValueError for what is no field of it."""
    if config is not None and not isinstance(config, EngineConfig):
        raise ValueError(f"config is {config!r}; it must be an EngineConfig (give single settings by keyword)")
    known = [each.name for each in fields(EngineConfig)]
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]} is not a setting of the engine; there are {', '.join(known)}")
    return replace(config or EngineConfig(), **overrides)


def is_int(value: object, low: int, high: float = math.inf) -> bool:
    """Whether it is an integer of this range. In Python a bool is an int, but True is no count."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
