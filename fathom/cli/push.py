"""`fathom push`: a model directory onto the Hugging Face hub."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from fathom.checkpoint.hf.hub import push


@dataclass(frozen=True)
class PushCommand:
    """Upload a model directory to the Hugging Face hub, as whoever is logged in (`hf auth login`)."""

    directory: tyro.conf.Positional[Path]
    """A Hugging Face model directory, such as `fathom export` writes."""
    repo: tyro.conf.Positional[str]
    """Its name on the hub: owner/name; made where it does not exist."""
    private: bool = False
    """Make a new repository private."""
    message: str = "Upload a model with Fathom"
    """What the commit says."""


def run(words: list[str]) -> None:
    command = tyro.cli(PushCommand, args=words, prog="fathom push")
    print(push(command.directory, command.repo, command.private, command.message))
