"""Figures are well-formed, show their data, and cope with almost none."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fathom.lab.figures import Series, bars, heat_key, heat_strip, line_chart, ticks

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_subnormal=False)


@given(NUMBERS, NUMBERS, st.integers(2, 12))
def test_ticks_enclose_the_range_evenly_and_are_few(one: float, other: float, most: int) -> None:
    low, high = min(one, other), max(one, other)
    found = ticks(low, high, most)
    slack = 1e-6 * max(abs(low), abs(high))
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= most + 1
    gaps = [after - before for before, after in pairwise(found)]
    assert min(gaps) > 0 and max(gaps) - min(gaps) <= 1e-9 * max(map(abs, found))


@given(st.integers(0, 900), st.integers(1, 900), st.integers(-6, 6))
def test_ticks_are_round(low: int, size: int, decade: int) -> None:
    found = ticks(low * 10.0**decade, (low + size) * 10.0**decade)
    step = found[1] - found[0]
    assert f"{step:.6e}"[0] in "125" and float(f"{step:.6e}") == float(f"{step:.0e}")
    assert all(float(f"{tick:.10g}") == tick for tick in found)  # the label is the number, not near it


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-7])
def test_ticks_of_a_single_number_widen_around_it(value: float) -> None:
    found = ticks(value, value)
    assert found[0] <= value <= found[-1] and found[0] < found[-1]


def parsed(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(figure)


def test_a_charts_label_names_its_series_and_their_ends() -> None:
    series = [Series("<loss>", [(1, 8.0), (2, 4.0), (3, 2.5)]), Series("mtp", [(1, 9.0), (3, 3.0)], "dashed", "two")]
    figure = parsed(line_chart("a & b", "step", series, [("gzip", 2.25)]))
    svg = figure.find("svg")
    assert svg is not None
    label = svg.attrib["aria-label"]
    assert label == "a & b; <loss> from 8 at 1 to 2.5 at 3; mtp from 9 at 1 to 3 at 3; gzip 2.25"
    assert figure.findtext("svg/title") == "a & b"
    assert [item.text or item[0].tail for item in figure.iter("li")] == ["<loss>", "mtp"]
    assert len(svg.findall("path")) == 2


def test_a_missing_value_is_a_gap_and_a_lone_point_shows() -> None:
    figure = parsed(line_chart("t", "x", [Series("s", [(1, 2.0), (2, None), (3, 4.0), (4, 5.0)])]))
    path = next(figure.iter("path")).attrib["d"]
    assert path.count("M") == 2 and path.startswith("M") and "h0M" in path
    lone = parsed(line_chart("t", "x", [Series("s", [(1, 2.0)], "joined")]))
    assert len(list(lone.iter("circle"))) == 2  # the point and its key


@pytest.mark.parametrize("series", [[], [Series("s", [])], [Series("s", [(1, None)])]])
def test_a_chart_without_data_says_so(series: list[Series]) -> None:
    assert "Nothing was recorded" in "".join(parsed(line_chart("t", "x", series)).itertext())


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), min_size=1), NUMBERS)
def test_every_mark_lies_inside_its_chart(points: list[tuple[float, float | None]], reference: float) -> None:
    assume(max(abs(reference), *(abs(y or 0) for _, y in points)) < 1e9)
    figure = parsed(line_chart("t", "x", [Series("s", points, "dots")], [("r", reference)]))
    svg = figure.find("svg")
    assert svg is not None
    for dot in svg.findall("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= 640 and 0 <= float(dot.attrib["cy"]) <= 300


def test_a_heat_strip_paints_each_cell_once_by_its_level() -> None:
    columns = [[2.0, 1.0, 0.0], [4.0, 1.05, 0.5], [1.0, 1.3, 1.0]]
    figure = parsed(heat_strip("layer", columns))
    painted = {
        (path.attrib["class"], path.attrib["fill-opacity"]): re.findall(r"M(\d+) (\d+)h(\d+)", path.attrib["d"])
        for path in figure.iter("path")
    }
    assert painted == {
        ("over", "1.0"): [("0", "0", "2")],  # twice, then four times the mean: one run
        ("under", "1.0"): [("0", "2", "2")],
        ("over", "0.5"): [("2", "1", "1")],
    }


def test_a_heat_strip_without_data_says_so_and_the_key_has_nine_shades() -> None:
    assert "Nothing was recorded" in heat_strip("layer", [])
    assert len(list(parsed(heat_key("less", "more")).iter("path"))) == 9


def test_bars_are_proportional_and_named() -> None:
    figure = parsed(bars("cache", [("small", 10.0, "10 bytes"), ("large", 40.0, "40 bytes")]))
    widths = [float(rect.attrib["width"]) for rect in figure.iter("rect")]
    assert widths == [160.0, 640.0]
    assert [text.text for text in figure.iter("text")] == ["small: 10 bytes", "large: 40 bytes"]
