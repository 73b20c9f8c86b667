"""Figures for the pages: line charts, heat strips and bars as inline SVG, without a plotting library.

Each function returns an XHTML fragment that needs `STYLE`, the style sheet of the page. Colours are Okabe and Ito's
blue and vermilion, which colour-blind readers tell apart, lightened for dark pages; no meaning rests on colour alone:
series differ in stroke too, and the label of every figure describes it in words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

Points = Sequence[tuple[float, float | None]]

STYLE = """
:root { --page: #fff; --panel: #f3f5f7; --rule: #d3d8de; --ink: #1b2026; --quiet: #57616c; --one: #0072b2;
  --two: #c44e00; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --panel: #1f2429; --rule: #3a424a; --ink: #e7eaed;
  --quiet: #9da7b1; --one: #56b4e9; --two: #f2904a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.55 system-ui, sans-serif }
main { max-width: 46rem; margin: auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2 } h2 { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: 1rem }
h3 { overflow-wrap: anywhere; margin-bottom: .3rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem }
.cards div { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; display: flex;
  flex-direction: column-reverse; justify-content: flex-end }
dt { color: var(--quiet); font-size: .85rem } dd { margin: 0; font-size: 1.7rem; font-weight: 650 }
table { border-collapse: collapse; width: 100% } caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--rule);
  overflow-wrap: anywhere } th { font-weight: 500; overflow-wrap: break-word }
.numbers td { overflow-wrap: break-word }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 0 1.5rem }
.strips figure { margin: .5rem 0 } .strips figcaption { font-size: .9rem; font-weight: 500; color: var(--quiet) }
pre { background: var(--panel); border-radius: .5rem; padding: .9rem; overflow-x: auto; font-size: .82rem;
  line-height: 1.6 }
.prompt { color: var(--quiet) } .new { font-weight: 600 }
mark { color: inherit; font-weight: 600; background: color-mix(in srgb, var(--one) 22%, transparent);
  text-decoration: underline 2px var(--one); text-underline-offset: 3px }
figure { margin: 1.2rem 0 }
figcaption { font-weight: 600; margin-bottom: .3rem }
figure > svg { display: block; width: 100%; overflow: visible }
svg text { fill: var(--quiet); font-size: 14px }
svg .axis { stroke: var(--rule); stroke-width: 1 }
svg .one { stroke: var(--one); fill: var(--one) }
svg .two { stroke: var(--two); fill: var(--two) }
svg .line, svg .dashed, svg .joined { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
svg .dashed { stroke-dasharray: 7 5 }
svg .reference { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 2 4 }
svg .name { fill: var(--ink); stroke: var(--page); stroke-width: 4; paint-order: stroke }
.key { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem;
  color: var(--quiet); font-size: .9rem }
.key svg { width: 2.2rem; height: .8rem; margin-right: .4rem } .key .heat { width: 9rem; margin: 0 .4rem }
.heat { background: var(--panel); border: 1px solid var(--rule); shape-rendering: crispEdges }
.over { fill: var(--two) } .under { fill: var(--one) }
@media (max-width: 600px) { svg text { font-size: 22px } }
"""

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 18, 64


@dataclass(frozen=True)
class Series:
    """One line, or set of dots, of a chart."""

    label: str
    points: Points
    """(x, y) from left to right; a y of None is a gap."""
    mark: Literal["line", "dashed", "joined", "dots"] = "line"
    colour: Literal["one", "two"] = "one"


@dataclass(frozen=True)
class _Frame:
    """Maps the values of a chart to SVG coordinates."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    x_end: float

    def x(self, value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / self.x_end

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` + 1 evenly spaced round numbers (1, 2 or 5 times a power of ten apart) that enclose low to high.

    Where both are (nearly) the same number, the range is widened around it.
    """
    size = max(abs(low), abs(high))
    size = size if size > 1e-99 else 1.0
    if high - low <= 1e-9 * size:
        low, high = low - size / 2, high + size / 2
    decade = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        # Dividing by a power of ten is exact where multiplying by 0.1 is not: 0.3, not 0.30000000000000004.
        up, down = factor * 10 ** max(decade, 0), 10 ** max(-decade, 0)
        first, last = math.floor(low * down / up), math.ceil(high * down / up)
        if last - first <= most:
            break
    return [i * up / down for i in range(first, last + 1)]


def line_chart(
    title: str,
    x_label: str,
    series: Sequence[Series],
    references: Sequence[tuple[str, float]] = (),
    zero: bool = False,
) -> str:
    """Series over an x axis that begins at 0, with named horizontal `references`; `zero`: the y axis does, too."""
    drawn = [one for one in series if any(y is not None for _, y in one.points)]
    if not drawn:
        return nothing(title)
    heights = [y for one in drawn for _, y in one.points if y is not None] + [value for _, value in references]
    x_end = max(x for one in drawn for x, _ in one.points) or 1
    across = [tick for tick in ticks(0, x_end) if tick <= x_end]
    frame = _Frame(across, ticks(0 if zero else min(heights), max(heights)), x_end)
    body = _axes(frame, x_label) + _references(frame, references) + "".join(_drawn(frame, one) for one in drawn)
    key = "".join(f"<li>{_swatch(one)}{escape(one.label)}</li>" for one in drawn)
    label = "; ".join([title, *map(_summary, drawn), *(f"{name} {value:.4g}" for name, value in references)])
    return figure(title, label, f"0 0 {_WIDTH} {_HEIGHT}", body, f'<ul class="key">{key}</ul>')


def heat_strip(title: str, columns: Sequence[Sequence[float]]) -> str:
    """Ratios as colours, one column per time step: 1 is the background, more is orange, less is blue."""
    if not columns:
        return nothing(title)
    rows = len(columns[0])
    runs: dict[int, list[str]] = {}
    for row in range(rows):
        at = 0
        for level, group in groupby(_level(column[row]) for column in columns):
            width = len(list(group))
            runs.setdefault(level, []).append(f"M{at} {row}h{width}v1h-{width}z")
            at += width
    body = "".join(_cells(level, "".join(runs[level])) for level in sorted(runs) if level)
    label = f"{title}: {rows} rows over {len(columns)} steps"
    height = rows * max(1, min(6, 240 // rows))
    shape = f'class="heat" preserveAspectRatio="none" style="height: {height}px"'
    return figure(title, label, f"0 0 {len(columns)} {rows}", body, shape=shape)


def heat_key(low: str, high: str) -> str:
    """The legend of heat strips; `low` and `high` label the ends, at half and at twice."""
    cells = "".join(_cells(level, f"M{level + 4} 0h1v1h-1z") for level in range(-4, 5))
    strip = f'<svg class="heat" viewBox="0 0 9 1" preserveAspectRatio="none" aria-hidden="true">{cells}</svg>'
    return f'<p class="key"><span>{escape(low)}{strip}{escape(high)}</span></p>'


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars from zero: (name, value, label)."""
    longest = max(value for _, value, _ in rows)
    body = ""
    for at, (name, value, words) in enumerate(rows):
        top, width = 64 * at, max(2.0, _WIDTH * value / longest)
        body += f'<text class="name" x="0" y="{top + 24}">{escape(name)}: {escape(words)}</text>'
        body += f'<rect class="{"one" if at == 0 else "two"}" x="0" y="{top + 34}" width="{width:.1f}" height="18"/>'
    label = "; ".join([title, *(f"{name} {words}" for name, _, words in rows)])
    return figure(title, label, f"0 0 {_WIDTH} {64 * len(rows)}", body)


def nothing(title: str) -> str:
    """In place of a figure without data."""
    return f"<figure><figcaption>{escape(title)}</figcaption><p>Nothing was recorded for this figure.</p></figure>"


def figure(title: str, label: str, box: str, body: str, key: str = "", shape: str = "") -> str:
    """An SVG under its title: `label` describes it in words, `box` is its viewBox, `body` its shapes."""
    name = escape(title)
    return (
        f'<figure><figcaption>{name}</figcaption><svg role="img" aria-label="{escape(label)}" viewBox="{box}" {shape}>'
        f"<title>{name}</title>{body}</svg>{key}</figure>"
    )


# ------------------------------------------------------------------------------------------------------- the parts


def _axes(frame: _Frame, x_label: str) -> str:
    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y:.1f}" dy=".35em" text-anchor="end">{tick:,.10g}</text>')
    for tick in frame.x_ticks:
        x = frame.x(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 26}" text-anchor="middle">{tick:,.10g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _references(frame: _Frame, references: Sequence[tuple[str, float]]) -> str:
    """Dotted lines; names are staggered from right to left, so that those of close lines do not overlap."""
    parts = []
    for at, (name, value) in enumerate(references):
        y, x = frame.y(value), _WIDTH - _RIGHT - 190 * at
        parts.append(f'<line class="reference" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="name" x="{x}" y="{y - 7:.1f}" text-anchor="end">{escape(name)}</text>')
    return "".join(parts)


def _drawn(frame: _Frame, series: Series) -> str:
    path, dots = "", ""
    for known, run in groupby(series.points, key=lambda point: point[1] is not None):
        if known:
            places = [(frame.x(x), frame.y(y)) for x, y in run if y is not None]
            # «h0» lets a run of a single point show, as a dot.
            path += "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) + "h0"
            dots += "".join(f'<circle class="{series.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in places)
    line = f'<path class="{series.colour} {series.mark}" d="{path}"/>'
    return {"dots": dots, "joined": line + dots}.get(series.mark, line)


def _swatch(series: Series) -> str:
    line = f'<path class="{series.colour} {series.mark}" d="M2 6H30"/>'
    dot = f'<circle class="{series.colour}" cx="16" cy="6" r="4.5"/>'
    drawn = {"dots": dot, "joined": line + dot}.get(series.mark, line)
    return f'<svg viewBox="0 0 32 12" aria-hidden="true">{drawn}</svg>'


def _summary(series: Series) -> str:
    """A series in words, for screen readers."""
    known = [(x, y) for x, y in series.points if y is not None]
    (x_first, y_first), (x_last, y_last) = known[0], known[-1]
    return f"{series.label} from {y_first:.4g} at {x_first:g} to {y_last:.4g} at {x_last:g}"


def _level(ratio: float) -> int:
    """−4 (half or less) to 4 (twice or more), 0 around 1, in equal factors."""
    return max(-4, min(4, round(4 * math.log2(ratio)))) if ratio > 0 else -4


def _cells(level: int, path: str) -> str:
    return f'<path class="{"over" if level > 0 else "under"}" fill-opacity="{abs(level) / 4}" d="{path}"/>'
