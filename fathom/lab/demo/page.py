"""The demo's report as one HTML file.

The page needs no network and no script; it is XHTML, so that a strict parser can check it. Every figure says in plain
words what it shows and names the section of the DeepSeek-V3 report (arXiv 2412.19437) that introduces the idea. All
text from data, above all generated code, is escaped by `_text`.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fathom.files import atomic_write
from fathom.lab.demo.report import (
    Continuation,
    DemoReport,
    cache_bytes,
    max_vio_ends,
    mechanisms,
    trained_on,
)
from fathom.lab.figures import STYLE, Points, Series, bars, heat_key, heat_strip, line_chart, nothing
from fathom.lab.routers import router_names
from fathom.model.config import ModelConfig
from fathom.train.progress import duration


def write_html(report: DemoReport, path: Path) -> None:
    """One self-contained page, for phones, light and dark mode and screen readers."""
    sections = (_headline, _learning, _balancing, _cache, _drafting, _continuations, _reproducing)
    body = "".join(f"<section>{section(report)}</section>\n" for section in sections)
    page = (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Fathom: the demo's report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )
    atomic_write(path, page)


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> Points:
    return [(row["step"], row[key]) for row in metrics if key in row]


def _against(model: float, other: float, name: str) -> str:
    difference = model / other - 1
    return f"{abs(difference):.0%} {'fewer' if difference < 0 else 'more'} bits than {name}"


def _headline(report: DemoReport) -> str:
    cards = [
        ("bits per byte of held-out text", f"{report.bits_per_byte:.3f}"),
        ("gzip -9, same text", f"{report.gzip:.3f}"),
        ("xz -9, same text", f"{report.xz:.3f}"),
        ("training time", duration(report.seconds)),
    ]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in mechanisms(report))
    verdict = (
        "A small DeepSeek-V3, trained on this machine. On held-out text it needs "
        f"{_against(report.bits_per_byte, report.gzip, 'gzip')} and {_against(report.bits_per_byte, report.xz, 'xz')}."
    )
    return (
        f'<h1>Fathom: what a small DeepSeek-V3 learned</h1><p>{verdict}</p><dl class="cards">{figures}</dl>'
        f"<p>{_text(trained_on(report))}</p>"
        f"<h2>The four ideas, measured</h2><table>{rows}</table>"
        "<p>Sections named below are those of the DeepSeek-V3 report, arXiv 2412.19437.</p>"
    )


def _learning(report: DemoReport) -> str:
    losses = [Series("the next token", _curve(report.metrics, "loss"))]
    if report.config.num_nextn_predict_layers:
        losses.append(Series("the token after it (MTP)", _curve(report.metrics, "mtp_loss"), "dashed", "two"))
    points = [Series("this model", _curve(report.metrics, "val_bpb"), "joined")]
    compressors = [(f"gzip -9: {report.gzip:.2f}", report.gzip), (f"xz -9: {report.xz:.2f}", report.xz)]
    return (
        "<h2>1. Learning</h2><p>The model is trained to predict the next token of Python source code. The loss is the "
        f"cross-entropy per token in nats; a uniform guess among {report.config.vocab_size:,} tokens costs "
        f"{math.log(report.config.vocab_size):.1f}.</p>"
        + line_chart("Training loss (nats per token)", "training step", losses)
        + "<p>Bits per byte measure the same on held-out files, independent of the tokenizer: a "
        "model with b bits per byte could compress the text to b/8 of its size. The dotted lines are two "
        f"general-purpose compressors on that text. At the end: {report.bits_per_byte:.3f}, against "
        f"{report.gzip:.3f} for gzip and {report.xz:.3f} for xz.</p>"
        + line_chart("Held-out bits per byte", "training step", points, compressors)
    )


def _balancing(report: DemoReport) -> str:
    config, names = report.config, router_names(report.config)
    heading = "<h2>2. Balancing the experts</h2>"
    if not names:
        return f"{heading}<p>This model has no MoE layers, so there is nothing to balance.</p>"
    introduction = (
        f"<p>In each MoE layer a router sends every token to {config.num_experts_per_tok} of "
        f"{config.n_routed_experts} experts. Instead of an auxiliary loss, each expert has a bias that is "
        "increased while it gets too few tokens and decreased while it gets too many; the bias affects which experts "
        "are selected, never their weights (report, section 2.1.2).</p>"
    )
    strips = "".join(heat_strip(name, _ratios(report.loads, at)) for at, name in enumerate(names))
    worst = [
        Series("worst layer, each training batch", _curve(report.metrics, "max_vio")),
        Series("worst layer, summed over held-out text", _curve(report.metrics, "val_max_vio"), "dots", "two"),
    ]
    return (
        f"{heading}{introduction}<h3>Every expert's load</h3><p>Each strip is one router, each row in it an expert; "
        "time runs from left to right. Orange: more tokens than the mean; blue: fewer; an even strip is "
        "balanced.</p>"
        + heat_key("≤ ½ of the mean", "≥ 2×")
        + f'<div class="strips">{strips}</div>'
        + "<p>MaxVio is the load of the busiest expert over the mean, minus 1: 0 is perfect balance, 1 means twice the "
        "mean. A batch is small, so its MaxVio does not reach 0.</p>"
        + line_chart("MaxVio of the worst layer", "training step", worst, zero=True)
        + _balance_table(report, names)
    )


def _ratios(loads: Sequence[tuple[int, list[list[int]]]], router: int) -> list[list[float]]:
    """Load over mean load of a router's experts, one list for each record."""
    columns = []
    for _, tokens_per_expert_LE in loads:
        mean = sum(tokens_per_expert_LE[router]) / len(tokens_per_expert_LE[router])
        columns.append([load / mean if mean else 1.0 for load in tokens_per_expert_LE[router]])
    return columns


def _balance_table(report: DemoReport, names: Sequence[str]) -> str:
    if not report.loads or not report.max_vio_global:
        return nothing("MaxVio of each router")
    rows = "".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{value:.2f}</td>" for value in values) + "</tr>"
        for name, *values in zip(names, *max_vio_ends(report), report.max_vio_global, strict=True)
    )
    columns = ("router", f"step {report.loads[0][0]}", f"step {report.loads[-1][0]}", "held-out text")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<table class="numbers"><caption>MaxVio of each router</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _cache(report: DemoReport) -> str:
    config = report.config
    latent, plain = cache_bytes(config)
    full_latent, full_plain = cache_bytes(ModelConfig())
    heads = config.num_attention_heads
    rows = [
        ("Multi-head latent attention", float(latent), f"{latent:,} bytes"),
        ("Multi-head attention, same heads", float(plain), f"{plain:,} bytes"),
    ]
    return (
        "<h2>3. The cache</h2><p>Decoding caches something of every earlier token. Multi-head attention caches keys "
        f"and values of all heads: {heads} × ({config.qk_head_dim} + {config.v_head_dim}) elements per layer. Latent "
        "attention caches one latent vector from which they are computed, and one rotary key: "
        f"{config.kv_lora_rank} + {config.qk_rope_head_dim} elements (report, section 2.1.1).</p>"
        + bars(f"Cache per token, {config.num_hidden_layers} layers in bfloat16", rows)
        + f"<p>That is {latent / plain:.1%}. Larger models save more: for the 671B "
        f"DeepSeek-V3 it is {full_latent:,} bytes against {full_plain:,}, or {full_latent / full_plain:.1%}.</p>"
    )


def _drafting(report: DemoReport) -> str:
    heading = "<h2>4. Multi-token prediction</h2>"
    if not report.config.num_nextn_predict_layers:
        return f"{heading}<p>This model has no MTP module, so every token needs one forward pass.</p>"
    plain, speed = report.plain_tokens_per_second, report.speculative_tokens_per_second
    rows = [
        ("acceptance rate in continuations of held-out files", f"{report.acceptance:.1%}"),
        ("agreement of drafts with the model on held-out text", f"{report.agreement:.1%}"),
        ("tokens per forward pass", f"{report.tokens_per_forward:.2f}"),
        ("tokens per second without drafts, batch size 1", f"{plain:,.1f}"),
        ("tokens per second with drafts", f"{speed:,.1f} ({speed / plain:.2f}×)"),
    ]
    table = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return (
        f"{heading}<p>A small extra module learns to predict the token after the next one. In decoding this is a "
        "draft that the model verifies in the forward pass for the following token: an accepted draft is a token "
        "at almost no cost, and the text is the same as without drafts (report, sections 2.2 and 5.4.3, which finds an "
        "acceptance rate of 85 to 90 % and 1.8 times the speed).</p>"
        f'<table class="numbers"><caption>Drafts in greedy decoding</caption>{table}</table>'
    )


def _continuations(report: DemoReport) -> str:
    key = 'Grey: the prompt, from a held-out file. <span class="new">Bold: generated by the model.</span>'
    if report.config.num_nextn_predict_layers:
        key += " <mark>Underlined, shaded: an accepted draft of the MTP module.</mark>"
    samples = "".join(map(_sample, report.continuations)) or "<p>No continuations were made.</p>"
    return (
        "<h2>5. Samples</h2><p>Greedy continuations of held-out files. A model this small has learned what Python "
        f"looks like, not what programs mean.</p><p>{key}</p>{samples}"
    )


def _sample(sample: Continuation) -> str:
    generated = "".join(
        f"<mark>{_text(token.text)}</mark>" if token.accepted_draft else f'<span class="new">{_text(token.text)}</span>'
        for token in sample.tokens
    )
    return (
        f"<h3>{_text(sample.source)}</h3><p>{sample.tokens_per_forward:.2f} tokens per forward pass</p>"
        f'<pre tabindex="0"><span class="prompt">{_text(sample.prompt)}</span>{generated}</pre>'
    )


def _reproducing(report: DemoReport) -> str:
    command = f"fathom generate {shlex.quote(report.model_directory)} --prompt 'def read('"
    facts = [("machine", report.machine), ("corpus", report.corpus)]
    shape = [(field.name, getattr(report.config, field.name)) for field in dataclasses.fields(report.config)]
    return (
        "<h2>6. Reproduce it</h2><p>The first command trains, measures and writes this page; the second lets the model "
        f'continue a prompt.</p><pre tabindex="0">make demo\n{_text(command)}</pre>'
        f"<table>{_facts(facts)}</table><h3>The model's configuration</h3><p>These are the keys of its config.json.</p>"
        f'<table class="numbers">{_facts(shape)}</table>'
    )


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    return "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(str(value))}</td></tr>' for name, value in rows)


def _text(text: str) -> str:
    """Escaped; characters that no XML document may hold, which byte-level tokens can make, become U+FFFD."""
    return escape(re.sub("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
