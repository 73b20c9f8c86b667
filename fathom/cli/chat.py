"""`fathom chat`: talk to a model in the terminal."""

import time
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from fathom.cli.load import Dtype, load
from fathom.engine.detokenizer import OutputStream
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.quantization.integer import Precision


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model. Ctrl-C stops an answer, an empty line or Ctrl-D quits; /new starts a new conversation."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    system: str | None = None
    """The system message."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        default_factory=lambda: SamplingParams(temperature=0.7, top_p=0.95, max_tokens=1024)
    )
    speculative: bool = True
    """Let the MTP module draft where that is faster."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    quantize: Precision | None = None
    """Weight-only quantisation to 8 or 4 bits."""


def run(words: list[str]) -> None:
    command = tyro.cli(ChatCommand, args=words, prog="fathom chat")
    model, tokenizer = load(command.path, command.dtype, command.quantize)
    engine = Engine(model, tokenizer, speculative=command.speculative, max_batch=1)
    engine.chat_template  # noqa: B018 (missing packages and templates are reported before the first line)
    console = Console(highlight=False)
    beginning = [] if command.system is None else [{"role": "system", "content": command.system}]
    messages = list(beginning)
    while (line := _read_line(console)) is not None:
        if line == "/new":
            messages = list(beginning)
            continue
        messages.append({"role": "user", "content": line})
        ids = engine.encode_chat(messages)
        if len(ids) >= engine.max_length:
            console.print(
                f"The conversation has {len(ids)} tokens, the context {engine.max_length}; /new starts a new one."
            )
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": _answer(engine, ids, command.sampling, console)})


def _read_line(console: Console) -> str | None:
    try:
        return console.input("[bold]> [/bold]").strip() or None
    except (EOFError, KeyboardInterrupt):
        return None


def _answer(engine: Engine, ids: list[int], params: SamplingParams, console: Console) -> str:
    """Print an answer as it comes, until it ends or is interrupted; returns it."""
    assert engine.tokenizer is not None
    handle = engine.submit(ids, params)
    output, answer, began = OutputStream(handle, engine.tokenizer), "", time.perf_counter()
    try:
        while not handle.finished:
            engine.step()
            answer += (text := output.new_text())
            console.out(text, end="", highlight=False)
        if handle.error is not None:
            raise ValueError(handle.error)
    except KeyboardInterrupt:
        engine.cancel(handle)
    console.out("")
    rate = len(handle.token_ids) / (time.perf_counter() - began)
    drafts = f", {handle.acceptance:.0%} of drafts accepted" if handle.drafted else ""
    console.print(f"{len(handle.token_ids)} tokens, {rate:.0f} tokens/s{drafts}", style="dim")
    return answer
