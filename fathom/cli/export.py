"""`fathom export`: write a model in the format of another program."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fathom.checkpoint.convert import convert, convert_gguf
from fathom.checkpoint.hf.save import Verification
from fathom.config import ConfigError


@dataclass(frozen=True)
class ExportCommand:
    """Write a model, with its tokenizer, in the format of other programs; memory use does not grow with the model."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, a run's `model`, or a name on the hub."""
    to: Literal["hf", "fp8", "gguf"]
    """hf: bfloat16 or float32. fp8: blocks of 128x128, as DeepSeek-V3 is released. gguf: one file for llama.cpp."""
    out: Path
    """The output directory; an existing model there is replaced once the new one is complete."""
    dtype: Literal["bf16", "f32", "q8_0"] | None = None
    """Type of the weights, bf16 by default: hf takes bf16 or f32, gguf all three; fp8 takes none."""
    verify: bool = False
    """Read the result back and compare every value with its source."""


def run(words: list[str]) -> None:
    command = tyro.cli(ExportCommand, args=words, prog="fathom export")
    dtype = command.dtype or "bf16"
    if command.to == "gguf":
        report(*convert_gguf(command.path, command.out, dtype, command.verify))
        return
    if command.to == "fp8":
        if command.dtype is not None:
            raise ConfigError(f"--dtype is {command.dtype}; --to fp8 determines the types, so leave it out")
        report(command.out, convert(command.path, command.out, "fp8", verify=command.verify))
        return
    if dtype == "q8_0":
        raise ConfigError("--dtype is q8_0, which needs --to gguf; hf takes bf16 or f32")
    report(command.out, convert(command.path, command.out, dtype, verify=command.verify))


def report(out: Path, verification: Verification | None) -> None:
    """Print what was written."""
    print(out)
    if verification is not None:
        print(f"verified: {verification.tensors} tensors, relative error {verification.relative_error:.2e}")
