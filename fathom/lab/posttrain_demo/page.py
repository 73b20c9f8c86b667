"""The report of post-training as one HTML file, without network or script; XHTML, like the demo's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fathom.eval.pass_rate import Interval
from fathom.files import atomic_write
from fathom.lab.figures import STYLE, Points, Series, line_chart
from fathom.posttrain.evaluate import GREEDY
from fathom.train.progress import duration

_SHOWN = {
    GREEDY: "solved greedily (pass@1)",
    "pass@1": "solved at temperature 1 (pass@1)",
    "pass@4": "solved by one of four (pass@4)",
    "stop_rate": "answers that end by themselves",
}


@dataclass(frozen=True)
class Stage:
    """A model and what was measured of it."""

    name: str
    metrics: dict[str, Interval]
    bits_per_byte: float
    """Of the text it was pretrained on, held out."""
    acceptance: float | None
    """Of the MTP module's drafts in greedy answers."""


@dataclass(frozen=True)
class PosttrainReport:
    """Everything the report shows."""

    task: str
    stages: list[Stage]
    gain: dict[str, Interval]
    """What reinforcement changed, paired by problem."""
    sft: list[dict[str, Any]]
    """metrics.jsonl of fine-tuning."""
    rl: list[dict[str, Any]]
    """metrics.jsonl of reinforcement learning."""
    samples: list[tuple[str, list[tuple[str, str, bool]]]]
    """Problems, each with (model, answer, whether it is right)."""
    problems: int
    seconds: float
    model: str

    @property
    def shown(self) -> list[tuple[str, str]]:
        """The metrics of tables, each with its name there."""
        return [(metric, name) for metric, name in _SHOWN.items() if metric in self.stages[0].metrics]


def write_html(report: PosttrainReport, path: Path) -> None:
    """One self-contained page."""
    sections = (_headline, _fine_tuning, _reinforcing, _parity, _kept, _answers)
    body = "".join(f"<section>{section(report)}</section>\n" for section in sections)
    page = (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Fathom: post-training</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )
    atomic_write(path, page)


def _curve(rows: Sequence[dict[str, Any]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if key in row]


def _headline(report: PosttrainReport) -> str:
    cards = [(f"{stage.name}, {_SHOWN[GREEDY]}", f"{stage.metrics[GREEDY].value:.0%}") for stage in report.stages]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    gain = report.gain[GREEDY]
    head = "".join(f'<th scope="col">{stage.name}</th>' for stage in report.stages)
    rows = "".join(
        _row(name, [_cell(stage.metrics[metric]) for stage in report.stages]) for metric, name in report.shown
    )
    return (
        f"<h1>{_verdict(report)}</h1>"
        f'<dl class="cards">{figures}</dl>'
        f"<p>Task: {escape(report.task)}. Rewards changed pass@1 by {gain.value * 100:+.0f} points; the 95 % interval, "
        f"paired over {report.problems} test problems that no training saw, is {gain.low * 100:+.0f} to "
        f"{gain.high * 100:+.0f}. Both runs and the measurements took {duration(report.seconds)}.</p>"
        f'<table class="numbers"><caption>{report.problems} test problems, with 95 % intervals</caption>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _verdict(report: PosttrainReport) -> str:
    before, after = (report.stages[at].metrics[GREEDY].value for at in (1, 2))
    if report.gain[GREEDY].low > 0:
        return f"Rewards lift the share of solved problems from {before:.0%} to {after:.0%}"
    if report.gain[GREEDY].high < 0:
        return f"Rewards lower the share of solved problems from {before:.0%} to {after:.0%}"
    return f"Rewards leave the share of solved problems where it was: {before:.0%}, then {after:.0%}"


def _fine_tuning(report: PosttrainReport) -> str:
    losses = [Series("the next token", _curve(report.sft, "loss"))]
    losses.append(Series("the token after it (MTP)", _curve(report.sft, "mtp_loss"), "dashed", "two"))
    return (
        "<h2>1. Fine-tuning on worked solutions</h2><p>The model learns to continue problems by solutions that are "
        "worked out step by step. Only the solution's tokens are trained, and samples that share a row do not see each "
        "other (DeepSeek-V3 report, section 5.1).</p>"
        + line_chart("Loss (nats per token of a solution)", "step", losses)
    )


def _reinforcing(report: PosttrainReport) -> str:
    solved = [
        Series("answers sampled while training", _curve(report.rl, "pass_rate")),
        Series("test problems, greedily", _curve(report.rl, "test_pass_rate"), "dots", "two"),
    ]
    lengths = [Series("tokens of an answer", _curve(report.rl, "length"))]
    entropy = [Series("entropy of the next token", _curve(report.rl, "entropy"))]
    return (
        "<h2>2. Reinforcement on rewards</h2><p>Now no solutions are shown. The model samples a group of answers to "
        "each problem; a rule says which are right; those better than their group become likelier, the others less "
        "likely (GRPO, arXiv 2402.03300, with the capped ratios of 2506.13585).</p>"
        + line_chart("Share of right answers", "step", solved, zero=True)
        + line_chart("Length", "step", lengths, zero=True)
        + line_chart("Entropy (nats)", "step", entropy, zero=True)
    )


def _parity(report: PosttrainReport) -> str:
    worst = max((row["max_abs_dlogp"] for row in report.rl if "max_abs_dlogp" in row), default=0.0)
    rerouted = max((row["route_mismatch"] for row in report.rl if "route_mismatch" in row), default=0.0)
    return (
        "<h2>3. One code samples and trains</h2><p>Where two programs do, a mixture of experts routes some tokens "
        "differently in each, and training may collapse (arXiv 2510.11370). Here the trainer replays the experts that "
        f"the engine chose. Largest difference of a log-probability between the two, over all steps: {worst:.1e}. "
        f"Largest share of tokens that the trainer alone would have routed otherwise: {rerouted:.2%}.</p>"
    )


def _kept(report: PosttrainReport) -> str:
    rows = "".join(
        _row(each.name, [f"{each.bits_per_byte:.3f}", "" if each.acceptance is None else f"{each.acceptance:.0%}"])
        for each in report.stages
    )
    head = '<th></th><th scope="col">bits per byte</th><th scope="col">drafts accepted</th>'
    balance = [Series("worst router", _curve(report.rl, "max_vio"))]
    return (
        "<h2>4. What was kept</h2><p>Bits per byte of held-out Python, which the model was pretrained on, say how "
        "much it forgot; the module that drafts (MTP) is trained on the answers all the while, so that drafts stay "
        f'accepted.</p><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "<p>The biases that balance the experts stand still while rewards are learnt. MaxVio is the load of the "
        "busiest expert over the mean, minus 1.</p>" + line_chart("MaxVio", "step", balance, zero=True)
    )


def _answers(report: PosttrainReport) -> str:
    parts = []
    for question, answers in report.samples:
        shown = "".join(
            f"<h3>{name}: {'right' if right else 'wrong'}</h3><pre>{escape(answer)}</pre>"
            for name, answer, right in answers
        )
        parts.append(f'<pre><span class="prompt">{escape(question)}</span></pre>{shown}')
    return (
        "<h2>5. Answers to test problems</h2><p>Greedy; problems that the models differ in come first.</p>"
        + "<hr/>".join(parts)
        + "<h2>Next</h2><pre>"
        + escape(f".venv/bin/fathom chat {report.model}\n.venv/bin/fathom eval {report.model} --task {report.task}")
        + "</pre>"
    )


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _cell(interval: Interval) -> str:
    return f"{interval.value:.0%} ({interval.low:.0%}–{interval.high:.0%})"
