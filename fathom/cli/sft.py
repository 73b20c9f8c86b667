"""`fathom sft`: supervised fine-tuning on conversations."""

from fathom.cli.posttrain import run_posttrain
from fathom.posttrain.sft import sft
from fathom.posttrain.sft_config import SftRun


def run(words: list[str]) -> None:
    run_posttrain("sft", SftRun, sft, words)
