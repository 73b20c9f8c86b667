"""The report of post-training: it is XHTML, says what was found, and escapes what a model wrote."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.config import ConfigError
from fathom.eval.pass_rate import Interval
from fathom.lab.posttrain_demo.command import PosttrainDemoCommand, run_posttrain_demo
from fathom.lab.posttrain_demo.page import PosttrainReport, Stage, write_html
from fathom.posttrain.evaluate import GREEDY


def _report(low: float, high: float) -> PosttrainReport:
    def metrics(value: float) -> dict[str, Interval]:
        return {name: Interval(value, value - 0.1, value + 0.1) for name in (GREEDY, "pass@1", "stop_rate")}

    rl = [
        {"step": step, "pass_rate": 0.1 * step, "length": 60, "entropy": 0.1, "max_vio": 0.5, "max_abs_dlogp": 2e-5}
        for step in range(1, 5)
    ]
    return PosttrainReport(
        task="addition",
        stages=[
            Stage("pretrained", metrics(0.1), 1.5, None),
            Stage("fine-tuned", metrics(0.4), 1.6, 0.8),
            Stage("reinforced", metrics(0.6), 1.65, 0.85),
        ],
        gain={GREEDY: Interval((low + high) / 2, low, high)},
        sft=[{"step": step, "loss": 3 / step, "mtp_loss": 2 / step} for step in range(1, 5)],
        rl=[*rl, {"step": 4, "test_pass_rate": 0.5}],
        samples=[
            ("1 + 1 <b>", [("fine-tuned", "answer: <script>3", False), ("reinforced", "answer: 2 & no more", True)])
        ],
        problems=50,
        seconds=312,
        model="runs/posttrain/rl/model",
    )


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.3, "Rewards lift the share of solved problems from 40% to 60%"),
        (-0.3, -0.1, "Rewards lower the share of solved problems from 40% to 60%"),
        (-0.1, 0.3, "Rewards leave the share of solved problems where it was: 40%, then 60%"),
    ],
)
def test_the_headline_is_what_the_interval_allows(low: float, high: float, said: str, tmp_path: Path) -> None:
    write_html(_report(low, high), tmp_path / "page.html")
    page = ElementTree.parse(tmp_path / "page.html")
    text = "".join(page.getroot().itertext())
    assert said in text and "2.0e-05" in text and "answer: <script>3" in text
    assert not page.findall(".//{*}script")


def test_a_module_that_was_not_measured_leaves_its_cell_empty(tmp_path: Path) -> None:
    report = _report(0.1, 0.3)
    write_html(
        replace(report, stages=[replace(stage, acceptance=None) for stage in report.stages]), tmp_path / "p.html"
    )
    page = ElementTree.parse(tmp_path / "p.html")
    rows = [["".join(cell.itertext()) for cell in row] for row in page.iter("{http://www.w3.org/1999/xhtml}tr")]
    assert ["fine-tuned", "1.600", ""] in rows and ["fine-tuned", "1.600", "80%"] not in rows


def test_without_the_demos_model_it_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`make demo` trains a small model there"):
        run_posttrain_demo(PosttrainDemoCommand(model=tmp_path / "none", out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
