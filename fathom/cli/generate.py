"""`fathom generate`: continue one text."""

import sys
import time
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from rich.console import Console

from fathom.checkpoint.hf.model import load_model, model_directory
from fathom.config import ConfigError
from fathom.data.tokenizer import load_tokenizer
from fathom.engine.detokenizer import OutputStream
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampling.sampler import SamplingParams
from fathom.model.quantize import quantized
from fathom.quantization.integer import Precision
from fathom.runtime.hardware import install_allocator


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a text with any DeepSeek-V3-architecture model directory."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    prompt: str
    """Text to continue; «-» reads it from standard input."""
    sampling: Annotated[SamplingParams, tyro.conf.arg(name="")] = field(default_factory=SamplingParams)
    speculative: bool = True
    """Let the MTP module draft where that is faster (the tokens are the same, or of the same distribution)."""
    eager: bool = False
    """Plain torch alone, without compiled kernels or CUDA graphs."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    quantize: Precision | None = None
    """Weight-only quantisation to 8 or 4 bits: faster where reading weights takes the time, a little less exact."""


def run(words: list[str]) -> None:
    command = tyro.cli(GenerateCommand, args=words, prog="fathom generate")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if command.dtype not in dtypes:
        raise ConfigError(f"--dtype is {command.dtype!r}; it must be {' or '.join(dtypes)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        install_allocator()
    directory = model_directory(command.path)
    model = load_model(directory, dtypes[command.dtype], device)
    if command.quantize is not None:
        model = quantized(model, command.quantize)
    tokenizer = load_tokenizer(directory)
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
    seconds = time.perf_counter() - began
    tokens, accepted, compiled = len(handle.token_ids), "", engine.compile_seconds
    if handle.drafted:
        accepted = f", {handle.accepted / handle.drafted:.0%} of drafts accepted"
    compiling = f", {compiled:.1f} of them to compile kernels and capture graphs" if compiled else ""
    Console(stderr=True).print(
        f"{tokens} tokens in {seconds:.1f} s{compiling}, {handle.tokens_per_forward:.2f} per forward pass{accepted}",
        style="dim",
        highlight=False,
    )
