"""What a study is made of: entries that are run, comparisons that are judged, a picture, a table.

Stages run one after another, and a later one may depend on what an earlier one found: a learning rate that was tuned,
or how many steps fit into the seconds another variant took.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Literal

from fathom.data.corpus import DataConfig
from fathom.lab.ablations.recipe import with_train
from fathom.lab.ablations.scales import Scale
from fathom.lab.ablations.statistics import Expectation
from fathom.lab.ablations.trial import Record
from fathom.lab.ablations.variants import Variant

Found = Mapping[str, Mapping[int, Record]]
"""The records of each entry by seed."""

TUNING_SEED = 1000
"""Learning rates are tried with this seed, which no comparison uses."""


@dataclass(frozen=True)
class Entry:
    """One row of a study's table."""

    name: str
    variant: Variant
    tuning: bool = False
    """Run with the tuning seed alone and left out of the table."""
    timed: bool = False
    """Its length follows from measured seconds, so it differs from machine to machine."""


@dataclass(frozen=True)
class Comparison:
    """One paired difference, variant minus baseline."""

    variant: str
    baseline: str
    metric: str
    expectation: Expectation
    margin: float = 0.0
    """For «close»: the share of the baseline's mean that may be lost."""
    decides: bool = True
    """Whether the claim's verdict rests on it."""


@dataclass(frozen=True)
class Figure:
    """What a study's picture shows."""

    kind: Literal["bars", "curves"]
    metric: str
    label: str


@dataclass(frozen=True)
class Study:
    """One claim."""

    name: str
    claim: str
    equal: str
    """What all variants have in common."""
    papers: str
    """What the papers report, for comparison."""
    columns: tuple[str, ...]
    """Metrics of the table (document.METRICS)."""
    timings: tuple[str, ...]
    """Metrics of the table of timings."""
    comparisons: tuple[Comparison, ...]
    figure: Figure
    stages: tuple[Callable[[Scale, DataConfig, Found], list[Entry]], ...]
    facts: Callable[[Found], list[str]] = lambda found: []
    """Sentences that follow from the results."""


def value(record: Record, metric: str) -> float:
    """A metric of one run: a result, a timing, or a cost counted on the model. NaN where it has none."""
    for part in ("results", "timing", "costs"):
        if metric in record[part]:
            return float(record[part][metric])
    return math.nan


def mean_of(found: Found, name: str, metric: str) -> float:
    return mean(value(record, metric) for record in found[name].values())


def as_long(entry: Entry, model: str, label: str, found: Found) -> Entry:
    """`entry` with about as many steps as take the seconds that `model` took.

    In sixteenths of the run, which is no coarser than the clock: a study that is repeated mostly has the same lengths.
    """
    seconds = {name: mean_of(found, name, "seconds_per_step") for name in (entry.name, model)}
    steps = next(iter(found[model].values()))["variant"]["run"]["train"]["steps"]
    part = max(1, steps // 16)
    longer = part * max(1, round(steps * seconds[model] / seconds[entry.name] / part))
    return Entry(f"{entry.name}, {label}", replace(with_train(entry.variant, steps=longer), measures=()), timed=True)
