"""`fathom posttrain-demo`: a small model learns to solve problems, in minutes."""

import tyro

from fathom.lab.posttrain_demo.command import PosttrainDemoCommand, run_posttrain_demo


def run(words: list[str]) -> None:
    run_posttrain_demo(tyro.cli(PosttrainDemoCommand, args=words, prog="fathom posttrain-demo"))
