"""A finished ablation as plain JSON, from which its page is generated and which is committed beside it."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from fathom.data.tokenize import TokenizedCorpus
from fathom.lab.ablations.design import Ablation, Comparison, Entry, Found, value
from fathom.lab.ablations.scales import Scale
from fathom.lab.ablations.statistics import Interval, interval, judge, overall, paired_difference

Summary = dict[str, Any]


def summarize(
    ablation: Ablation, scale: Scale, entries: Sequence[Entry], found: Found, prepared: TokenizedCorpus, command: str
) -> Summary:
    """Means, intervals, differences and verdicts, and the individual values."""
    shown = [entry for entry in entries if not entry.tuning]
    records = [record for name in found for record in found[name].values()]
    timed = {entry.name for entry in shown if entry.timed}
    comparisons = [_compared(comparison, ablation, timed, found) for comparison in ablation.comparisons]
    deciding = [c["verdict"] for c in comparisons if c["decides"]]
    return {
        "name": ablation.name,
        "claim": ablation.claim,
        "verdict": overall(deciding),
        "equal": ablation.equal,
        "papers": ablation.papers,
        "facts": ablation.facts(found),
        "scale": asdict(scale),
        "seeds": sorted(found[shown[0].name]),
        "command": command,
        "corpus": {"name": prepared.config.corpus, "sha256": prepared.corpus_hash},
        "machine": records[0]["machine"],
        "runs": len(records),
        "train_seconds": sum(value(record, "train_seconds") for record in records),
        "busy": [extreme(value(record, "busy") for record in records) for extreme in (min, max)],
        "columns": list(ablation.columns),
        "timings": list(ablation.timings),
        "figure": asdict(ablation.figure),
        "rows": [_row(entry, ablation, found) for entry in shown],
        "comparisons": comparisons,
    }


def _row(entry: Entry, ablation: Ablation, found: Found) -> dict[str, Any]:
    records = found[entry.name]
    metrics = dict.fromkeys((*ablation.columns, *ablation.timings, *(c.metric for c in ablation.comparisons)))
    summaries = {}
    for metric in metrics:
        values = {seed: value(record, metric) for seed, record in records.items()}
        if not any(map(math.isnan, values.values())):
            summaries[metric] = {**_finite(interval(list(values.values()))), "values": _by_seed(values)}
    variant = next(iter(records.values()))["variant"]
    row = {"name": entry.name, "timed": entry.timed, "metrics": summaries, "variant": variant}
    if ablation.figure.kind == "curves":
        curves = [record["curve"] for record in records.values()]
        points = zip(*(curve[ablation.figure.metric] for curve in curves), strict=True)
        row["curve"] = {"step": curves[0]["step"], "mean": [fmean(point) for point in points]}
    return row


def _compared(comparison: Comparison, ablation: Ablation, timed: set[str], found: Found) -> dict[str, Any]:
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
        "timed": metric in ablation.timings or not timed.isdisjoint((comparison.variant, comparison.baseline)),
        "verdict": judge(difference, comparison.expectation, margin),
    }


def _finite(found: Interval) -> dict[str, float | None]:
    """JSON has no infinity: the open bounds of a single seed become null."""
    return {key: bound if math.isfinite(bound) else None for key, bound in asdict(found).items()}


def _by_seed(values: dict[int, float]) -> dict[str, float]:
    return {str(seed): values[seed] for seed in sorted(values)}


def path_of(docs: Path, scale: str, name: str) -> Path:
    """The file of an ablation's summary below the documents."""
    return docs / "ablations" / scale / f"{name}.json"


def found_path(docs: Path, scale: str, name: str) -> Path | None:
    """The file of a summary that exists; those that an earlier release wrote are in `docs`/claims."""
    path, earlier = path_of(docs, scale, name), docs / "claims" / scale / f"{name}.json"
    if not path.exists() and earlier.exists():
        warnings.warn(f"{earlier}: results are in {path.parent} now; move it there", DeprecationWarning, stacklevel=2)
        return earlier
    return path if path.exists() else None
