# ruff: noqa: N999
"""`fathom import`: convert any model that can be loaded into Fathom's own layout.

The file is named like a keyword, which only `import` statements cannot spell; commands are imported by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from fathom.checkpoint.convert import convert
from fathom.cli.export import report


@dataclass(frozen=True)
class ImportCommand:
    """Convert any loadable model (FP8, stacked experts, on the hub) to our layout in bfloat16 or float32."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    out: Path
    """The output directory; an existing model there is replaced once the new one is complete."""
    dtype: Literal["bf16", "f32"] = "bf16"
    """Type of the weights; correction biases are always float32."""
    verify: bool = False
    """Read the result back and compare every value with its source."""


def run(words: list[str]) -> None:
    command = tyro.cli(ImportCommand, args=words, prog="fathom import")
    report(command.out, convert(command.path, command.out, command.dtype, verify=command.verify))
