"""`fathom plan`: what training and serving a model takes, before it is tried."""

from fathom.lab.planner.command import plan_command


def run(words: list[str]) -> None:
    plan_command(words)
