"""`fathom generate`: continue one text."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console

from fathom.cli.load import Dtype, load
from fathom.data.tokenizer import Tokenizer
from fathom.engine.detokenizer import OutputStream
from fathom.engine.engine import Engine
from fathom.engine.outputs import Generation
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.engine.sampling.verify import TokenLogprob
from fathom.quantization.integer import Precision

_LOOP_TOKENS, _LOOP_TIMES = 8, 3
"""An output that ends with so many repetitions of so many tokens is reported as a loop."""


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
    if (loop := loop_at_end(handle.token_ids)) is not None:
        length, times = loop
        unit = "token" if length == 1 else f"{length} tokens"
        cure = "a higher --temperature or --repetition-penalty avoids it"
        notes.print(f"The output ends in a loop, the same {unit} {times} times in a row; {cure}.", style="yellow")


def _summary(handle: Generation, seconds: float, compiled: float) -> str:
    compiling = f", {compiled:.1f} of them to compile kernels and capture graphs" if compiled else ""
    accepted = f", {handle.accepted / handle.drafted:.0%} of drafts accepted" if handle.drafted else ""
    forwards = f", {handle.tokens_per_forward:.2f} per forward pass" if handle.forwards else ""
    return f"{len(handle.token_ids)} tokens in {seconds:.1f} s{compiling}{forwards}{accepted}"


def logprob_lines(handle: Generation, tokenizer: Tokenizer) -> Iterator[str]:
    """A table of the log-probabilities that were requested, the prompt's first, each with the likeliest tokens'."""
    rows: list[tuple[int, TokenLogprob]] = []
    if handle.prompt_logprobs is not None:
        rows += zip(handle.prompt_ids[1:], handle.prompt_logprobs, strict=True)
    if handle.logprobs is not None:
        rows += zip(handle.token_ids, handle.logprobs, strict=True)

    def spelled(token: int) -> str:
        return repr(tokenizer.token_bytes(token).decode(errors="replace"))

    if rows:
        yield "logprob  rank  token"
    for token, found in rows:
        top = "".join(f"  {logprob:.3f} {spelled(other)}" for other, logprob in found.top)
        likeliest = f"   likeliest:{top}" if top else ""
        yield f"{found.logprob:7.3f}  {found.rank:4}  {spelled(token)}{likeliest}"


def loop_at_end(ids: Sequence[int]) -> tuple[int, int] | None:
    """(length, repetitions) of the shortest sequence of tokens that the output repeats up to its end.

    None where it is no loop: less than 3 repetitions of 8 tokens, which a shorter sequence fills several times.
    """
    for length in range(1, len(ids) // _LOOP_TIMES + 1):
        unit = -(-_LOOP_TOKENS // length) * length
        repeated = length
        while repeated < len(ids) and ids[-1 - repeated] == ids[-1 - repeated + length]:
            repeated += 1
        if repeated >= _LOOP_TIMES * unit:
            return length, repeated // length
    return None
