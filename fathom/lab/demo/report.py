"""The demo's report: what the four ideas of DeepSeek-V3 did in one small run, with its figures for the terminal.

`page.py` shows the same as one HTML file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fathom.lab.routers import router_names
from fathom.model.balance import max_violation
from fathom.model.config import ModelConfig
from fathom.train.progress import duration

_BF16 = 2  # bytes of an element of the cache


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token."""

    text: str
    """The text it adds."""
    accepted_draft: bool
    """Whether it was an accepted draft of an MTP module, which needed no forward pass of its own."""


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation of a held-out text."""

    source: str
    """The held-out document's name."""
    prompt: str
    """The text before."""
    tokens: tuple[GeneratedToken, ...]
    """The generated tokens."""
    tokens_per_forward: float
    """Generated tokens per forward pass of the main model; plain decoding: 1."""


@dataclass(frozen=True)
class DemoReport:
    """Everything the report shows. Figures on drafts are left out for a model without MTP modules."""

    config: ModelConfig
    """The model's shape."""
    corpus: str
    """The training text: name, size, hash."""
    metrics: list[dict[str, Any]]
    """The records of metrics.jsonl: steps and evaluations."""
    loads: list[tuple[int, list[list[int]]]]
    """(step, tokens per expert for each router, MTP modules' routers last), from the first step to the last."""
    bits_per_byte: float
    """The trained model's bits per byte of the held-out text."""
    gzip: float
    """Those of `gzip -9`."""
    xz: float
    """Those of `xz -9`."""
    max_vio_global: list[float]
    """MaxVio of each router, with loads summed over the held-out text."""
    acceptance: float
    """Acceptance rate of drafts in greedy continuations of held-out prompts."""
    agreement: float
    """Share of held-out positions where the draft is the main model's most likely token."""
    tokens_per_forward: float
    """Tokens per forward pass of the main model in those continuations."""
    plain_tokens_per_second: float
    """Greedy decoding at batch size 1 on this machine, without drafts."""
    speculative_tokens_per_second: float
    """The same, with drafts."""
    seconds: float
    """Duration of training."""
    tokens: int
    """Tokens trained on."""
    machine: str
    """Processor, torch version and precision."""
    continuations: tuple[Continuation, ...]
    """Samples of what the model writes."""
    model_directory: str = "runs/demo/model"
    """Directory of the model, for the command that runs it."""


def print_report(report: DemoReport, console: Console) -> None:
    """Bits per byte and the figures of the four mechanisms, in 80 columns."""
    title = "Bits per byte of held-out text (fewer is better)"
    sizes = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))
    for name in ("this model", "gzip -9", "xz -9"):
        sizes.add_column(name, justify="right")
    sizes.add_row(f"{report.bits_per_byte:.3f}", f"{report.gzip:.3f}", f"{report.xz:.3f}")
    measured = Table(title="The four mechanisms, measured", title_justify="left", title_style="bold", width=78)
    measured.add_column("idea", style="bold")
    measured.add_column("in this run")
    for name, words in mechanisms(report):
        measured.add_row(name, Text(words), end_section=True)
    console.print(sizes)
    console.print(measured)
    console.print(Text(f"{trained_on(report)}\n{report.machine}", style="dim"), soft_wrap=True)


# ------------------------------------------------------------------------------------------------- the figures


def mechanisms(report: DemoReport) -> Iterator[tuple[str, str]]:
    """(name, measurement) of the four ideas, for the terminal and the page."""
    config, counts = report.config, report.config.parameter_counts()
    latent, plain = cache_bytes(config)
    yield (
        "Latent attention (MLA)",
        f"caches {latent:,} bytes per token; multi-head attention with the same heads would cache {plain:,} "
        f"({latent / plain:.1%})",
    )
    taken = f"{config.num_experts_per_tok} of {config.n_routed_experts} experts and {config.n_shared_experts} shared"
    yield (
        "DeepSeekMoE",
        f"each token is routed to {taken}: {counts.active / 1e6:.1f}M of {counts.total / 1e6:.1f}M parameters "
        f"({counts.active / counts.total:.0%})"
        if config.num_moe_layers
        else f"no MoE layers: every token passes through all {counts.total / 1e6:.1f}M parameters",
    )
    names = router_names(config)
    if names and report.loads and report.max_vio_global:
        first, last = max_vio_ends(report)
        worst = max(range(len(report.max_vio_global)), key=report.max_vio_global.__getitem__)
        yield (
            "Balancing without a loss",
            f"MaxVio of the worst layer {max(first):.2f} at step {report.loads[0][0]}, {max(last):.2f} at step "
            f"{report.loads[-1][0]}; on all held-out text {report.max_vio_global[worst]:.2f} ({names[worst]})",
        )
    else:
        yield "Balancing without a loss", "no loads recorded" if names else "no MoE layers, so nothing to balance"
    if config.num_nextn_predict_layers:
        plain_speed, speed = report.plain_tokens_per_second, report.speculative_tokens_per_second
        yield (
            "Multi-token prediction",
            f"acceptance rate {report.acceptance:.1%}, {report.tokens_per_forward:.2f} tokens per forward pass; "
            f"{plain_speed:,.1f} tokens/s without drafts, {speed:,.1f} with ({speed / plain_speed:.2f}×)",
        )
    else:
        yield "Multi-token prediction", "the model has no MTP module"


def cache_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of cache per token over all layers in bfloat16: (MLA's, multi-head attention's)."""
    plain = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    each = config.num_hidden_layers * _BF16
    return config.cache_width * each, plain * each


def max_vio_ends(report: DemoReport) -> tuple[list[float], list[float]]:
    """Each router's MaxVio at the first recorded step and at the last."""
    first, last = (max_violation(torch.tensor(report.loads[at][1])).tolist() for at in (0, -1))
    return first, last


def trained_on(report: DemoReport) -> str:
    return f"Trained on {report.tokens:,} tokens in {duration(report.seconds)}: {report.corpus}"
