"""`fathom prefer`: preference training on pairs of answers."""

from fathom.cli.posttrain import run_posttrain
from fathom.posttrain.prefer import prefer
from fathom.posttrain.prefer_data import PreferRun


def run(words: list[str]) -> None:
    run_posttrain("prefer", PreferRun, prefer, words)
