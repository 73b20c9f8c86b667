"""`fathom inspect`: run a model over a text and write a page, and JSON, on what its parts did."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from fathom.checkpoint.hf.directory import model_directory
from fathom.checkpoint.hf.model import load_model
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer
from fathom.files import atomic_write
from fathom.lab.inspector.facts import Facts, gather
from fathom.lab.inspector.page import page_of
from fathom.lab.inspector.text import Source, default_text, file_text, given_text, tokenized
from fathom.lab.inspector.trace import plan_windows, trace_text


@dataclass(frozen=True)
class InspectCommand:
    """Write one HTML page on what a model's experts, heads, latents and drafts do with a text."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    text: str | None = None
    """The text; without --text and --file: a file of the standard library that is held out of training."""
    file: Path | None = None
    """A UTF-8 file with the text; *.py is classified as Python."""
    out: Path = Path("inspect.html")
    """The page, a single self-contained file."""
    json: Path | None = None
    """Also write the figures of the page here, as JSON."""
    tokens: int = 32768
    """Process at most this many tokens; statistics cover all of them."""
    shown: int = 512
    """Show about this many tokens individually, in excerpts spread over the text."""
    window: int = 512
    """Tokens per forward pass; at most the model's context."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type."""


def run_inspect(command: InspectCommand) -> None:
    """Load, trace, write. Raises ConfigError, ValueError or OSError for unusable input."""
    _check(command)
    console = Console(highlight=False)
    directory = model_directory(command.path)
    tokenizer = load_tokenizer(directory)
    source = _source(command)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(directory, torch.float32 if command.dtype == "float32" else torch.bfloat16, device)
    tokens = tokenized(source, tokenizer, model.config.vocab_size, command.tokens)
    began = time.perf_counter()
    plan = plan_windows(model.config, len(tokens.ids), command.window, command.shown)
    trace = trace_text(model, tokens.ids, tokenizer.bos_id, plan)
    facts = gather(command.path, model, tokenizer, source, tokens, trace)
    _print(facts, time.perf_counter() - began, console)
    atomic_write(command.out, page_of(facts))
    console.print(f"page       {command.out}", soft_wrap=True)
    if command.json is not None:
        atomic_write(command.json, json.dumps(facts, ensure_ascii=False, allow_nan=False) + "\n")
        console.print(f"figures    {command.json}", soft_wrap=True)


def _check(command: InspectCommand) -> None:
    if command.text is not None and command.file is not None:
        raise ConfigError("--text and --file are both given; give one of them")
    for name in ("tokens", "shown", "window"):
        if getattr(command, name) < 1:
            raise ConfigError(f"--{name} is {getattr(command, name)}; it must be at least 1")
    for name in ("out", "json"):
        path = getattr(command, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} is {path}; there is no directory {path.absolute().parent}")


def _source(command: InspectCommand) -> Source:
    if command.text is not None:
        return given_text(command.text)
    return default_text() if command.file is None else file_text(command.file, command.tokens)


def _print(facts: Facts, seconds: float, console: Console) -> None:
    """The headline figures."""
    text = facts["text"]
    cut = ", truncated" if text["cut"] else ""
    console.print(f"text       {text['name']}: {text['tokens']:,} tokens{cut}, in {seconds:.1f} s", soft_wrap=True)
    console.print(f"predicted  {text['bits_per_byte']:.3f} bits per byte, {text['bits_per_token']:.3f} per token")
    if facts["routers"]:
        worst = max(facts["routers"], key=lambda router: router["max_violation"])
        console.print(f"experts    MaxVio at most {worst['max_violation']:.2f} ({worst['name']})")
    used = [layer["dimensions_99"] for layer in facts["latents"]]
    rank = facts["model"]["latent_rank"]
    console.print(f"latents    {min(used)} to {max(used)} of {rank} dimensions hold 99 % of the energy")
    for draft in facts["drafts"]:
        if draft["agree"] is not None:
            console.print(f"drafts     module {draft['module']} agrees with the model on {draft['agree']:.1%}")
