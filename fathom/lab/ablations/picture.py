"""The plots of the ablations, drawn by matplotlib from their summaries."""

from pathlib import Path
from typing import TYPE_CHECKING

from fathom.lab.ablations.statistics import paired_difference
from fathom.lab.ablations.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STROKES = ("-", "--", "-.", ":")
_COLOURS = ("#0072b2", "#c44e00", "#008f68", "#57616c", "#a8548a", "#b58900", "#1b2026")
"""Okabe and Ito's, darkened for white paper; strokes differ too, so that no meaning rests on colour alone."""


def draw(summary: Summary, path: Path) -> None:
    """Write the plot as PNG. Raises ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the ablations need scipy and matplotlib: pip install 'fathom-lm[ablations]'") from error
    rows = len(summary["rows"])
    width = 9.2 if summary["figure"]["kind"] == "curves" else 7.2
    height = 3.6 if summary["figure"]["kind"] == "curves" else 1.3 + 0.34 * rows
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(summary["claim"], fontsize=9, loc="left", wrap=True)
    if summary["figure"]["kind"] == "curves":
        _curves(axes, summary)
    else:
        _bars(axes, summary)
    axes.spines[["top", "right"]].set_visible(False)
    # Without the date and version that matplotlib would add, equal pictures are equal files.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _bars(axes: "Axes", summary: Summary) -> None:
    """Every variant's paired difference from the first one, with its interval."""
    metric = summary["figure"]["metric"]
    first, *others = summary["rows"]
    baseline = {int(seed): value for seed, value in first["metrics"][metric]["values"].items()}
    for place, row in enumerate(others):
        values = {int(seed): value for seed, value in row["metrics"][metric]["values"].items()}
        difference = paired_difference(values, baseline)
        colour = _COLOURS[1] if row["timed"] else _COLOURS[0]
        axes.plot([difference.mean], [place], "o", color=colour)
        if len(values) > 1:
            axes.plot([difference.low, difference.high], [place, place], color=colour)
        axes.plot(
            [values[seed] - baseline[seed] for seed in values], [place] * len(values), "|", color=colour, alpha=0.6
        )
    axes.axvline(0, color="#1b2026", linewidth=0.8)
    axes.set_yticks(range(len(others)), [row["name"] for row in others], fontsize=8)
    axes.set_ylim(len(others) - 0.5, -0.5)
    axes.set_xlabel(f"{summary['figure']['label']} (95 % interval; ticks: seeds)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _curves(axes: "Axes", summary: Summary) -> None:
    for place, row in enumerate(summary["rows"]):
        stroke, colour = _STROKES[place % len(_STROKES)], _COLOURS[place % len(_COLOURS)]
        axes.plot(row["curve"]["step"], row["curve"]["mean"], stroke, color=colour, label=row["name"], linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step", fontsize=8)
    axes.set_ylabel(summary["figure"]["label"], fontsize=8)
    axes.tick_params(labelsize=8)
    # Beside the curves, which may be anywhere.
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
