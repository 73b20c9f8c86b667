"""`fathom study`: the architecture's claims, measured in miniature."""

import tyro

from fathom.lab.ablations.command import StudyCommand, run_studies


def run(words: list[str]) -> None:
    run_studies(tyro.cli(StudyCommand, args=words, prog="fathom study"))
