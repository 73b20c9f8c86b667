"""`fathom inspect`: what a model's experts, heads, latents and drafts do with a text, as a page."""

import tyro

from fathom.lab.inspector.command import InspectCommand, run_inspect


def run(words: list[str]) -> None:
    run_inspect(tyro.cli(InspectCommand, args=words, prog="fathom inspect"))
