"""`fathom push`: upload a model directory to the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fathom.checkpoint.hf.hub import push


@dataclass(frozen=True)
class PushCommand:
    """Upload a model directory to the Hugging Face hub, with the account of `hf auth login`."""

    directory: tyro.conf.Positional[Path]
    """A Hugging Face model directory, or one with a GGUF file, as `fathom export` writes them."""
    repo: tyro.conf.Positional[str]
    """The repository on the hub, owner/name; created if it does not exist."""
    private: bool = False
    """Create a new repository as private."""
    message: str = "Upload a model with Fathom"
    """The commit message."""


def run(words: list[str]) -> None:
    command = tyro.cli(PushCommand, args=words, prog="fathom push")
    print(push(command.directory, command.repo, command.private, command.message))
