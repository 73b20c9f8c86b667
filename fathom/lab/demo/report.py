"""The demo's report: what the four ideas of DeepSeek-V3 did in one small run, on the terminal and as one HTML file.

The page needs no network and no script; it is XHTML, so that a strict parser can check it. Every figure says in plain
words what it shows and names the section of the DeepSeek-V3 report (arXiv 2412.19437) that introduces the idea. All
text that comes from data, generated code above all, passes through `_text`.
"""

import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fathom.config import atomic_write
from fathom.lab.figures import STYLE, Points, Series, bars, heat_key, heat_strip, line_chart, nothing
from fathom.model.balance import max_violation
from fathom.model.config import ModelConfig
from fathom.train.progress import duration

_BF16 = 2  # bytes of a number in the cache


@dataclass(frozen=True)
class Piece:
    """One generated token."""

    text: str
    """What it adds to the text."""
    accepted_draft: bool
    """Whether an MTP module guessed it, so that it cost no forward pass of its own."""


@dataclass(frozen=True)
class Continuation:
    """A held-out text, continued greedily."""

    source: str
    """The held-out document's name."""
    prompt: str
    """The text before."""
    pieces: tuple[Piece, ...]
    """The generated tokens."""
    tokens_per_forward: float
    """Generated tokens per forward pass of the main model; plain decoding: 1."""


@dataclass(frozen=True)
class DemoReport:
    """Everything the report shows. The figures on drafts are left out for a model without MTP modules."""

    config: ModelConfig
    """The model's shape."""
    corpus: str
    """What was read: name, size, hash."""
    metrics: list[dict[str, Any]]
    """The records of metrics.jsonl, of steps and of evaluations."""
    loads: list[tuple[int, list[list[int]]]]
    """(step, tokens per expert for each router, MTP modules' routers last), from the first step to the last."""
    bits_per_byte: float
    """The trained model's bits per byte of the held-out text."""
    gzip: float
    """Those of `gzip -9`."""
    xz: float
    """Those of `xz -9`."""
    max_vio_global: list[float]
    """MaxVio of each router, loads summed over the held-out text."""
    acceptance: float
    """Share of drafts accepted in greedy continuations of held-out prompts."""
    agreement: float
    """Share of held-out positions where the draft is the main model's own most likely token."""
    tokens_per_forward: float
    """Tokens per forward pass of the main model in those continuations."""
    plain_tokens_per_second: float
    """Greedy decoding of one prompt on this machine, without drafts."""
    speculative_tokens_per_second: float
    """The same, with drafts."""
    seconds: float
    """How long training took."""
    tokens: int
    """Tokens trained on."""
    machine: str
    """Processor, torch version and precision."""
    continuations: tuple[Continuation, ...]
    """Samples of what the model writes."""
    model_directory: str = "runs/demo/model"
    """Where the model lies, for the command that talks to it."""


def print_report(report: DemoReport, console: Console) -> None:
    """The headline and the four mechanisms' figures; fits 80 columns."""
    title = "Bits per byte of held-out text (fewer is better)"
    sizes = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))
    for name in ("this model", "gzip -9", "xz -9"):
        sizes.add_column(name, justify="right")
    sizes.add_row(f"{report.bits_per_byte:.3f}", f"{report.gzip:.3f}", f"{report.xz:.3f}")
    mechanisms = Table(title="The four mechanisms, measured", title_justify="left", title_style="bold", width=78)
    mechanisms.add_column("idea", style="bold")
    mechanisms.add_column("in this run")
    for name, measured in _mechanisms(report):
        mechanisms.add_row(name, Text(measured), end_section=True)
    console.print(sizes)
    console.print(mechanisms)
    console.print(Text(f"{_trained(report)}\n{report.machine}", style="dim"))


def write_html(report: DemoReport, path: Path) -> None:
    """One self-contained page, readable on a phone, in light and dark, and aloud."""
    sections = (_headline, _learning, _balancing, _cache, _drafting, _continuations, _reproducing)
    body = "".join(f"<section>{section(report)}</section>\n" for section in sections)
    page = (
        '<!DOCTYPE html>\n<html xmlns="http://www.w3.org/1999/xhtml" lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Fathom: the demo's report</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}</main></body></html>\n"
    )
    atomic_write(path, page)


# ------------------------------------------------------------------------------------------------- the numbers


def _mechanisms(report: DemoReport) -> Iterator[tuple[str, str]]:
    """(name, measured figure) of the four ideas, in words for the terminal and the page alike."""
    config, counts = report.config, report.config.parameter_counts()
    latent, plain = _cache_bytes(config)
    yield (
        "Latent attention (MLA)",
        f"caches {latent:,} bytes per token; plain multi-head attention with the same heads {plain:,} "
        f"({latent / plain:.1%} of it)",
    )
    taken = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts and {config.n_shared_experts} shared"
    yield (
        "DeepSeekMoE",
        f"a token takes {taken}: {counts.active / 1e6:.1f}M of {counts.total / 1e6:.1f}M parameters "
        f"({counts.active / counts.total:.0%})"
        if config.num_moe_layers
        else f"no MoE layers: every token passes through all {counts.total / 1e6:.1f}M parameters",
    )
    names = _routers(config)
    if names and report.loads and report.max_vio_global:
        first, last = _extremes(report)
        worst = max(range(len(report.max_vio_global)), key=report.max_vio_global.__getitem__)
        yield (
            "Balancing without a loss",
            f"MaxVio of the worst layer {max(first):.2f} at step {report.loads[0][0]}, {max(last):.2f} at step "
            f"{report.loads[-1][0]}; on all held-out text {report.max_vio_global[worst]:.2f} ({names[worst]})",
        )
    else:
        yield "Balancing without a loss", "no loads recorded" if names else "nothing to balance: no MoE layers"
    if config.num_nextn_predict_layers:
        plain_speed, speed = report.plain_tokens_per_second, report.speculative_tokens_per_second
        yield (
            "Multi-token prediction",
            f"{report.acceptance:.1%} of drafts accepted, {report.tokens_per_forward:.2f} tokens per forward pass; "
            f"{plain_speed:.1f} tokens/s without drafts, {speed:.1f} with ({speed / plain_speed:.2f}×)",
        )
    else:
        yield "Multi-token prediction", "the model has no MTP module"


def _cache_bytes(config: ModelConfig) -> tuple[int, int]:
    """(MLA's, plain multi-head attention's) cache per token over all layers, in bfloat16."""
    plain = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    each = config.num_hidden_layers * _BF16
    return config.cache_width * each, plain * each


def _routers(config: ModelConfig) -> list[str]:
    """Names of the routers, in the order of the loads."""
    layers = [f"layer {i}" for i in range(config.first_k_dense_replace, config.num_hidden_layers)]
    return layers + [f"MTP module {i + 1}" for i in range(config.num_nextn_predict_layers)]


def _extremes(report: DemoReport) -> tuple[list[float], list[float]]:
    """Each router's MaxVio at the first recorded step and at the last."""
    first, last = (max_violation(torch.tensor(report.loads[at][1])).tolist() for at in (0, -1))
    return first, last


def _curve(metrics: Sequence[dict[str, Any]], key: str) -> Points:
    return [(row["step"], row[key]) for row in metrics if key in row]


def _trained(report: DemoReport) -> str:
    return f"Trained on {report.tokens:,} tokens in {duration(report.seconds)}: {report.corpus}"


def _against(model: float, other: float, name: str) -> str:
    difference = model / other - 1
    return f"{abs(difference):.0%} {'fewer' if difference < 0 else 'more'} bits than {name}"


# -------------------------------------------------------------------------------------------------- the sections


def _headline(report: DemoReport) -> str:
    cards = [
        ("bits per byte of held-out text", f"{report.bits_per_byte:.3f}"),
        ("gzip -9, same text", f"{report.gzip:.3f}"),
        ("xz -9, same text", f"{report.xz:.3f}"),
        ("training time", duration(report.seconds)),
    ]
    figures = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in _mechanisms(report))
    verdict = (
        "A DeepSeek-V3 in miniature, trained on this machine. On text it never saw it needs "
        f"{_against(report.bits_per_byte, report.gzip, 'gzip')} and {_against(report.bits_per_byte, report.xz, 'xz')}."
    )
    return (
        f'<h1>Fathom: what a small DeepSeek-V3 learned</h1><p>{verdict}</p><dl class="cards">{figures}</dl>'
        f"<p>{_text(_trained(report))}</p>"
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
        "<h2>1. Learning</h2><p>The model is trained to predict the next token of Python source code. The loss is its "
        f"surprise per token in nats; guessing blindly among {report.config.vocab_size:,} tokens costs "
        f"{math.log(report.config.vocab_size):.1f}.</p>"
        + line_chart("Training loss (nats per token)", "training step", losses)
        + "<p>Bits per byte measure the same surprise on files that were kept aside, independent of the tokenizer: a "
        "model with b bits per byte could compress the text to b/8 of its size. The dotted lines are what two "
        f"general-purpose compressors reach on that text. At the end: {report.bits_per_byte:.3f}, against "
        f"{report.gzip:.3f} for gzip and {report.xz:.3f} for xz.</p>"
        + line_chart("Held-out bits per byte", "training step", points, compressors)
    )


def _balancing(report: DemoReport) -> str:
    config, names = report.config, _routers(report.config)
    heading = "<h2>2. Balancing the experts</h2>"
    if not names:
        return f"{heading}<p>This model has no MoE layers, so there is nothing to balance.</p>"
    introduction = (
        f"<p>In each MoE layer a router sends every token to {config.num_experts_per_tok} of "
        f"{config.n_routed_experts} experts. Instead of a loss that punishes imbalance, each expert has a bias that is "
        "nudged up while it gets too few tokens and down while it gets too many; the bias decides who is chosen, never "
        "how much a choice weighs (report, section 2.1.2).</p>"
    )
    strips = "".join(heat_strip(name, _ratios(report.loads, at)) for at, name in enumerate(names))
    worst = [
        Series("worst layer, each training batch", _curve(report.metrics, "max_vio")),
        Series("worst layer, summed over held-out text", _curve(report.metrics, "val_max_vio"), "dots", "two"),
    ]
    return (
        f"{heading}{introduction}<h3>Every expert's load</h3><p>Each strip is one router, each row in it an expert; "
        "time runs from left to right. Warm rows get more than their share, cold ones less; an even strip is "
        "balance.</p>"
        + heat_key("≤ ½ of the mean", "≥ 2×")
        + f'<div class="strips">{strips}</div>'
        + "<p>MaxVio puts it in one number: how much more than the mean the busiest expert gets. 0 is perfect balance, "
        "1 means twice the mean. A batch is small, so its MaxVio never quite reaches 0.</p>"
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
        for name, *values in zip(names, *_extremes(report), report.max_vio_global, strict=True)
    )
    columns = ("router", f"step {report.loads[0][0]}", f"step {report.loads[-1][0]}", "held-out text")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<table class="numbers"><caption>MaxVio of each router</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _cache(report: DemoReport) -> str:
    config = report.config
    latent, plain = _cache_bytes(config)
    full_latent, full_plain = _cache_bytes(ModelConfig())
    heads = config.num_attention_heads
    rows = [
        ("Multi-head latent attention", float(latent), f"{latent:,} bytes"),
        ("Plain multi-head attention, same heads", float(plain), f"{plain:,} bytes"),
    ]
    return (
        "<h2>3. The cache</h2><p>To write the next token, attention needs something kept from every earlier one. Plain "
        f"attention keeps keys and values of all heads: {heads} × ({config.qk_head_dim} + {config.v_head_dim}) numbers "
        f"in each layer. Latent attention keeps one short vector from which they can be rebuilt, and one key that "
        f"carries the position: {config.kv_lora_rank} + {config.qk_rope_head_dim} numbers (report, section 2.1.1).</p>"
        + bars(f"Cache per token, {config.num_hidden_layers} layers in bfloat16", rows)
        + f"<p>That is {latent / plain:.1%} of the plain cache. The larger the model the more it saves: for the 671B "
        f"DeepSeek-V3 it is {full_latent:,} bytes against {full_plain:,}, or {full_latent / full_plain:.1%}.</p>"
    )


def _drafting(report: DemoReport) -> str:
    heading = "<h2>4. Multi-token prediction</h2>"
    if not report.config.num_nextn_predict_layers:
        return f"{heading}<p>This model has no MTP module, so every token takes one forward pass.</p>"
    plain, speed = report.plain_tokens_per_second, report.speculative_tokens_per_second
    rows = [
        ("drafts accepted when the model continues held-out files", f"{report.acceptance:.1%}"),
        ("drafts that agree with the model on real held-out text", f"{report.agreement:.1%}"),
        ("tokens per forward pass", f"{report.tokens_per_forward:.2f}"),
        ("tokens per second without drafts, one text at a time", f"{plain:.1f}"),
        ("tokens per second with drafts", f"{speed:.1f} ({speed / plain:.2f}×)"),
    ]
    table = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return (
        f"{heading}<p>A small extra module learns to guess the token after the next one. When writing, its guess is a "
        "draft that the model checks in the same forward pass that makes the following token: an accepted draft is a "
        "token for almost nothing, and the text is exactly the one the model would have written alone (report, "
        "sections 2.2 and 5.4.3, which finds 85 to 90 % accepted and 1.8 times the speed).</p>"
        f'<table class="numbers"><caption>Drafts in greedy decoding</caption>{table}</table>'
    )


def _continuations(report: DemoReport) -> str:
    key = 'Grey: the prompt, from a held-out file. <span class="new">Bold: written by the model.</span>'
    if report.config.num_nextn_predict_layers:
        key += " <mark>Underlined, shaded: an accepted draft of the MTP module.</mark>"
    samples = "".join(map(_sample, report.continuations)) or "<p>No continuations were made.</p>"
    return (
        "<h2>5. What it writes</h2><p>Files it has never seen, continued greedily. A model this small has learned how "
        f"Python looks, not what programs mean.</p><p>{key}</p>{samples}"
    )


def _sample(sample: Continuation) -> str:
    pieces = "".join(
        f"<mark>{_text(piece.text)}</mark>" if piece.accepted_draft else f'<span class="new">{_text(piece.text)}</span>'
        for piece in sample.pieces
    )
    return (
        f"<h3>{_text(sample.source)}</h3><p>{sample.tokens_per_forward:.2f} tokens per forward pass</p>"
        f'<pre tabindex="0"><span class="prompt">{_text(sample.prompt)}</span>{pieces}</pre>'
    )


def _reproducing(report: DemoReport) -> str:
    command = f"fathom generate {shlex.quote(report.model_directory)} --prompt 'def read('"
    facts = [("machine", report.machine), ("corpus", report.corpus)]
    shape = [(field.name, getattr(report.config, field.name)) for field in dataclasses.fields(report.config)]
    return (
        "<h2>6. Do it again</h2><p>The first command trains, measures and writes this page; the second lets the model "
        f'continue a text of yours.</p><pre tabindex="0">make demo\n{_text(command)}</pre>'
        f"<table>{_facts(facts)}</table><h3>The model's configuration</h3><p>These are the keys of its config.json.</p>"
        f'<table class="numbers">{_facts(shape)}</table>'
    )


def _facts(rows: Sequence[tuple[str, Any]]) -> str:
    return "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(str(value))}</td></tr>' for name, value in rows)


def _text(text: str) -> str:
    """Escaped; characters that no XML document may hold, which byte-level tokens can make, become U+FFFD."""
    return escape(re.sub("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))
