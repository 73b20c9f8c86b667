"""The inspector's figures, as inline SVG in the look of `fathom.lab.figures`."""

from collections.abc import Sequence

from fathom.lab.figures import figure
from fathom.lab.inspector.facts import RouterFacts

_WIDTH, _LOADS, _GAP, _BIASES = 640, 110, 14, 60


def load_and_bias(router: RouterFacts) -> str:
    """Above, each expert's load as a bar, the mean as a line; below, its correction bias, up or down from zero."""
    load = router["load"]
    mean = sum(load) / len(load) or 1.0
    ratios = [one / mean for one in load]
    top = max(2.0, *ratios)
    bars = _bars([_LOADS * ratio / top for ratio in ratios], _LOADS)
    level = _LOADS * (1 - 1 / top)
    body = f'<path class="one" d="{bars}"/>{_rule(_LOADS, "axis")}{_rule(level, "reference")}'
    words = f"MaxVio {router['max_violation']:.2f}, loads {min(ratios):.2f} to {max(ratios):.2f} × the mean"
    height = _LOADS
    biases = [bias or 0.0 for bias in router["bias"] or ()]
    if any(biases):
        height += _GAP + _BIASES
        most = max(map(abs, biases))
        middle = _LOADS + _GAP + _BIASES / 2
        steps = _bars([_BIASES / 2 * bias / most for bias in biases], middle)
        body += f'<path class="two" d="{steps}"/>{_rule(middle, "axis")}'
        words += f"; biases {min(biases):+.2f} to {max(biases):+.2f}"
    else:
        words += "; all biases are 0" if router["bias"] is not None else "; this router has no biases"
    return figure(f"{router['name']}: {words}", f"{router['name']}: {words}", f"0 -2 {_WIDTH} {height + 4}", body)


def spectrum(singular_values: Sequence[float | None]) -> str:
    """A small curve of a layer's singular values, against the largest; decorative, as the figures are beside it."""
    values = [value or 0.0 for value in singular_values]
    top, step = values[0] or 1.0, 100 / max(1, len(values))
    tops = "".join(f"L{step * (i + 0.5):.1f} {29 - 28 * value / top:.1f}" for i, value in enumerate(values))
    return (
        '<svg class="spectrum" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="one" d="M0 30{tops}L100 30z"/></svg>'
    )


def _bars(heights: Sequence[float], ground: float) -> str:
    """Bars side by side over the whole width, from the ground up (or down, below zero)."""
    each = _WIDTH / len(heights)
    wide = each * (0.8 if each > 4 else 1.0)
    return "".join(f"M{i * each:.1f} {ground:g}v{-tall:.1f}h{wide:.1f}V{ground:g}z" for i, tall in enumerate(heights))


def _rule(y: float, kind: str) -> str:
    return f'<line class="{kind}" x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
