"""`fathom generate`: continue one text."""

import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from fathom.cli.generation import logprob_lines, note_loop
from fathom.cli.load import Dtype, load
from fathom.engine.detokenizer import OutputStream
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.quantization.integer import Precision


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a text with any DeepSeek-V3-architecture model directory."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    prompt: str
    """Text to continue; «-» reads it from standard input."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(
        # Greedy decoding of a small base model soon repeats one statement for ever.
        default_factory=lambda: SamplingParams(temperature=0.7)
    )
    speculative: bool = True
    """Let the MTP module draft where that is faster (the tokens are the same, or of the same distribution)."""
    eager: bool = False
    """Plain torch alone, without compiled kernels or CUDA graphs."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    quantize: Precision | None = None
    """Weight-only quantisation to 8 or 4 bits: faster where reading weights takes the time, a little less exact."""


def run(words: list[str]) -> None:
    command = tyro.cli(GenerateCommand, args=words, prog="fathom generate")
    model, tokenizer = load(command.path, command.dtype, command.quantize)
    prompt = sys.stdin.read() if command.prompt == "-" else command.prompt
    engine = Engine(model, tokenizer, speculative=command.speculative, max_batch=1, eager=command.eager)
    handle = engine.submit(Request(prompt, command.sampling))
    output = OutputStream(handle, tokenizer)
    began = time.perf_counter()
    print(prompt, end="", flush=True)
    while engine.has_work:
        engine.step()
        print(output.new_text(), end="", flush=True)
    print()
    if handle.error is not None:
        raise ValueError(handle.error)
    seconds = time.perf_counter() - began
    for line in logprob_lines(handle, tokenizer):
        print(line)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    notes.print(_summary(handle, seconds, engine.compile_seconds), style="dim")
    note_loop(handle, notes)


def _summary(handle: Generation, seconds: float, compiled: float) -> str:
    compiling = f", {compiled:.1f} of them to compile kernels and capture graphs" if compiled else ""
    accepted = f", {handle.accepted / handle.drafted:.0%} of drafts accepted" if handle.drafted else ""
    forwards = f", {handle.tokens_per_forward:.2f} per forward pass" if handle.forwards else ""
    return f"{len(handle.token_ids)} tokens in {seconds:.1f} s{compiling}{forwards}{accepted}"
