"""How long a campaign takes, and its random numbers.

In `make test` each campaign takes the seconds that it names; FUZZ_SECONDS is for all of them together, an hour in
`make nightly`. FUZZ_SEED repeats a campaign: its seed is printed, and stands in its failures.
"""

import os
import random
import time
from collections.abc import Iterator

_CAMPAIGNS = 4
_SECONDS = os.environ.get("FUZZ_SECONDS")


_SEED = int(os.environ.get("FUZZ_SEED", time.time_ns() % 10**9))


def campaign_seed() -> int:
    """Of all draws."""
    return _SEED


def seconds(quick: float) -> float:
    """Of one campaign; `quick` where none are set."""
    return quick if _SECONDS is None else float(_SECONDS) / _CAMPAIGNS


def draws(name: str, quick: float, least: int = 1) -> Iterator[tuple[str, random.Random]]:
    """Until the time is over, but `least` times: a source of random numbers, and what repeats its draws."""
    print(f"{name}: FUZZ_SEED={_SEED}")
    end, number = time.monotonic() + seconds(quick), 0
    while number < least or time.monotonic() < end:
        yield f"FUZZ_SEED={_SEED}, draw {number}", random.Random(f"{_SEED} {number}")
        number += 1
