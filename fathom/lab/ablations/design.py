"""The parts of an ablation: entries to run, comparisons that are judged, a plot, a table.

Stages run one after another, and a later one may depend on the results of an earlier one: a tuned learning rate, or
the number of steps that fits into the training time of another variant.
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
"""The seed of learning rate searches; no comparison uses it."""


@dataclass(frozen=True)
class Entry:
    """One row of an ablation's table."""

    name: str
    variant: Variant
    tuning: bool = False
    """Run with the tuning seed only, and not shown in the table."""
    timed: bool = False
    """Its number of steps follows from measured seconds, so it differs between machines."""


@dataclass(frozen=True)
class Comparison:
    """One paired difference, variant minus baseline."""

    variant: str
    baseline: str
    metric: str
    expectation: Expectation
    margin: float = 0.0
    """For «close»: the allowed loss, as a fraction of the baseline's mean."""
    decides: bool = True
    """Whether the verdict on the claim depends on it."""


@dataclass(frozen=True)
class Figure:
    """What an ablation's plot shows."""

    kind: Literal["bars", "curves"]
    metric: str
    label: str


@dataclass(frozen=True)
class Ablation:
    """The test of one claim."""

    name: str
    claim: str
    equal: str
    """What is held fixed across the variants."""
    papers: str
    """What the papers report, for comparison."""
    columns: tuple[str, ...]
    """Metrics in the table of results (document.METRICS)."""
    timings: tuple[str, ...]
    """Metrics in the table of timings."""
    comparisons: tuple[Comparison, ...]
    figure: Figure
    stages: tuple[Callable[[Scale, DataConfig, Found], list[Entry]], ...]
    facts: Callable[[Found], list[str]] = lambda found: []
    """Sentences generated from the results."""


def value(record: Record, metric: str) -> float:
    """A metric of one run: a result, a timing, or a cost counted on the model. NaN where it has none."""
    for part in ("results", "timing", "costs"):
        if metric in record[part]:
            return float(record[part][metric])
    return math.nan


def mean_of(found: Found, name: str, metric: str) -> float:
    return mean(value(record, metric) for record in found[name].values())


def time_matched(entry: Entry, model: str, label: str, found: Found) -> Entry:
    """`entry` with the number of steps that takes about as long as `model` trained.

    Rounded to sixteenths of the run, about the precision of the clock, so that a repeated ablation mostly gets the
    same number.
    """
    seconds = {name: mean_of(found, name, "seconds_per_step") for name in (entry.name, model)}
    steps = next(iter(found[model].values()))["variant"]["run"]["train"]["steps"]
    part = max(1, steps // 16)
    longer = part * max(1, round(steps * seconds[model] / seconds[entry.name] / part))
    return Entry(f"{entry.name}, {label}", replace(with_train(entry.variant, steps=longer), measures=()), timed=True)
