"""`fathom ablations`: tests of the architecture's claims on small models."""

import tyro

from fathom.lab.ablations.command import AblationsCommand, run_ablations


def run(words: list[str]) -> None:
    run_ablations(tyro.cli(AblationsCommand, args=words, prog="fathom ablations"))
