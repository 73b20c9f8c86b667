"""`fathom export`: a model in the form that another program wants."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fathom.checkpoint.convert import convert, convert_gguf
from fathom.checkpoint.hf.save import Verified
from fathom.config import ConfigError


@dataclass(frozen=True)
class ExportCommand:
    """Write a model for other programs; memory does not grow with the model, and a tokenizer goes along."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, a run's `model`, or a name on the hub."""
    to: Literal["hf", "fp8", "gguf"]
    """hf: bfloat16 or float32. fp8: the blocks of DeepSeek-V3's release. gguf: one file for llama.cpp."""
    out: Path
    """The directory to write; a model that is there is replaced when the new one is complete."""
    dtype: Literal["bf16", "f32", "q8_0"] | None = None
    """Type of the weights, bf16 unless said otherwise: hf takes bf16 and f32, gguf all three, fp8 none."""
    verify: bool = False
    """Read the result back and compare every number with its source."""


def run(words: list[str]) -> None:
    command = tyro.cli(ExportCommand, args=words, prog="fathom export")
    dtype = command.dtype or "bf16"
    if command.to == "gguf":
        report(*convert_gguf(command.path, command.out, dtype, command.verify))
        return
    if command.to == "fp8":
        if command.dtype is not None:
            raise ConfigError(f"--dtype is {command.dtype}; fp8 has types of its own, so leave it out")
        report(command.out, convert(command.path, command.out, "fp8", verify=command.verify))
        return
    if dtype == "q8_0":
        raise ConfigError("--dtype is q8_0, which only gguf knows; hf takes bf16 or f32")
    report(command.out, convert(command.path, command.out, dtype, verify=command.verify))


def report(out: Path, verified: Verified | None) -> None:
    """Say what was written."""
    print(out)
    if verified is not None:
        print(f"verified: {verified.tensors} tensors, relative error {verified.relative_error:.2e}")
