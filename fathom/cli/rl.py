"""`fathom rl`: reinforcement learning on a task."""

from fathom.cli.posttrain import run_posttrain
from fathom.posttrain.rl import rl
from fathom.posttrain.rl_config import RlRun


def run(words: list[str]) -> None:
    run_posttrain("rl", RlRun, rl, words)
