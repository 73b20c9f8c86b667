"""`fathom distill`: train a student towards a teacher's predictions."""

from fathom.cli.posttrain import run_posttrain
from fathom.posttrain.distill import distill
from fathom.posttrain.distill_config import DistillRun


def run(words: list[str]) -> None:
    run_posttrain("distill", DistillRun, distill, words)
