"""`fathom demo`: the whole life of a small model in minutes."""

import tyro

from fathom.lab.demo.command import DemoCommand, run_demo


def run(words: list[str]) -> None:
    run_demo(tyro.cli(DemoCommand, args=words, prog="fathom demo"))
