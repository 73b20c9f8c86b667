# ruff: noqa: N999
"""`fathom import`: any model that can be loaded, in Fathom's own layout.

The file's name is a word of the language, which only `import` statements mind; commands are imported by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fathom.checkpoint.convert import convert
from fathom.cli.export import report


@dataclass(frozen=True)
class ImportCommand:
    """Write any loadable model (FP8 blocks, stacked experts, a name on the hub) in our layout, float32 or bfloat16."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    out: Path
    """The directory to write; a model that is there is replaced when the new one is complete."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Type of the weights; correction biases are float32 in both."""
    verify: bool = False
    """Read the result back and compare every number with its source."""


def run(words: list[str]) -> None:
    command = tyro.cli(ImportCommand, args=words, prog="fathom import")
    report(command.out, convert(command.path, command.out, command.dtype, verify=command.verify))
