"""A finished study as plain JSON: what the page is generated from and what is committed beside it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from fathom.data.tokenize import TokenizedCorpus
from fathom.lab.ablations.design import Comparison, Entry, Found, Study, value
from fathom.lab.ablations.scales import Scale
from fathom.lab.ablations.statistics import Interval, interval, judge, paired_difference, together

Summary = dict[str, Any]


def summarize(
    study: Study, scale: Scale, entries: Sequence[Entry], found: Found, prepared: TokenizedCorpus, command: str
) -> Summary:
    """Means, intervals, differences and verdicts; every single value too."""
    shown = [entry for entry in entries if not entry.tuning]
    records = [record for name in found for record in found[name].values()]
    timed = {entry.name for entry in shown if entry.timed}
    comparisons = [_compared(comparison, study, timed, found) for comparison in study.comparisons]
    deciding = [c["verdict"] for c in comparisons if c["decides"]]
    return {
        "name": study.name,
        "claim": study.claim,
        "verdict": together(deciding),
        "equal": study.equal,
        "papers": study.papers,
        "facts": study.facts(found),
        "scale": asdict(scale),
        "seeds": sorted(found[shown[0].name]),
        "command": command,
        "corpus": {"name": prepared.config.corpus, "sha256": prepared.corpus_hash},
        "machine": records[0]["machine"],
        "runs": len(records),
        "train_seconds": sum(value(record, "train_seconds") for record in records),
        "busy": [extreme(value(record, "busy") for record in records) for extreme in (min, max)],
        "columns": list(study.columns),
        "timings": list(study.timings),
        "figure": asdict(study.figure),
        "rows": [_row(entry, study, found) for entry in shown],
        "comparisons": comparisons,
    }


def _row(entry: Entry, study: Study, found: Found) -> dict[str, Any]:
    records = found[entry.name]
    metrics = dict.fromkeys((*study.columns, *study.timings, *(c.metric for c in study.comparisons)))
    numbers = {}
    for metric in metrics:
        values = {seed: value(record, metric) for seed, record in records.items()}
        if not any(map(math.isnan, values.values())):
            numbers[metric] = {**_finite(interval(list(values.values()))), "values": _by_seed(values)}
    variant = next(iter(records.values()))["variant"]
    row = {"name": entry.name, "timed": entry.timed, "metrics": numbers, "variant": variant}
    if study.figure.kind == "curves":
        curves = [record["curve"] for record in records.values()]
        points = zip(*(curve[study.figure.metric] for curve in curves), strict=True)
        row["curve"] = {"step": curves[0]["step"], "mean": [fmean(point) for point in points]}
    return row


def _compared(comparison: Comparison, study: Study, timed: set[str], found: Found) -> dict[str, Any]:
    metric = comparison.metric
    variant, baseline = (
        {seed: value(record, metric) for seed, record in found[name].items()}
        for name in (comparison.variant, comparison.baseline)
    )
    difference = paired_difference(variant, baseline)
    margin = comparison.margin * fmean(baseline.values())
    return {
        **asdict(comparison),
        **_finite(difference),
        "margin": margin,
        "share": comparison.margin,
        "timed": metric in study.timings or not timed.isdisjoint((comparison.variant, comparison.baseline)),
        "verdict": judge(difference, comparison.expectation, margin),
    }


def _finite(found: Interval) -> dict[str, float | None]:
    """JSON knows no infinity: a bound that one seed alone leaves open is null."""
    return {key: bound if math.isfinite(bound) else None for key, bound in asdict(found).items()}


def _by_seed(values: dict[int, float]) -> dict[str, float]:
    return {str(seed): values[seed] for seed in sorted(values)}


def path_of(docs: Path, scale: str, name: str) -> Path:
    """Where a study's summary lies among the documents."""
    return docs / "claims" / scale / f"{name}.json"
