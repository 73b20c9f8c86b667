"""`fathom sample`: rejection sampling, right answers as data for fine-tuning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from fathom.cli.load import Dtype, load
from fathom.config import check
from fathom.engine.engine import Engine
from fathom.engine.sampling.sampler import SamplingParams
from fathom.files import atomic_file
from fathom.posttrain.rejection import rejection_sample
from fathom.posttrain.tasks import task
from fathom.posttrain.tasks.protocol import problems


@dataclass(frozen=True)
class SampleCommand:
    """Answer a task's problems several times and write the right answers as conversations for `fathom sft`."""

    path: tyro.conf.Positional[str]
    """A Hugging Face model directory, or a name on the hub."""
    task: str
    """addition, sort_digits, reverse_letters, count_letters, calculator, or reasoning_gym:NAME."""
    out: Path
    """JSON Lines to write, a conversation a line."""
    samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8
    """Answers to each problem."""
    keep: int = 1
    """Right answers to keep of each problem; equal ones count once."""
    problems: int = 100
    """Training problems to answer."""
    start: int = 0
    """The first of them; those that another run has sampled can be skipped."""
    temperature: float = 1.0
    """Logits are divided by it."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities sum to this."""
    max_tokens: int = 256
    """Tokens of an answer, all its turns together."""
    seed: int = 0
    """Seed of everything that is drawn."""
    dtype: Dtype = "float32"
    """Data type of the weights."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("keep", 1), ("problems", 1), ("start", 0)):
            check(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        check(self.keep <= self.samples, "keep", self.keep, f"at most samples ({self.samples})")


def run(words: list[str]) -> None:
    command = tyro.cli(SampleCommand, args=words, prog="fathom sample")
    exercise = task(command.task)
    params = SamplingParams(command.temperature, top_p=command.top_p, max_tokens=command.max_tokens, seed=command.seed)
    model, tokenizer = load(command.path, command.dtype)
    engine = Engine(model, tokenizer, max_batch=min(command.samples * command.problems, 64))
    chosen = list(problems(exercise, "train", command.start, command.problems))
    answers = right = solved = kept = 0
    command.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(command.out) as aside, open(aside, "w", encoding="utf-8") as file:
        for found in rejection_sample(engine, exercise, chosen, command.samples, command.keep, params):
            answers, right, solved = answers + found.answers, right + found.right, solved + bool(found.right)
            kept += len(found.kept)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.kept)
    Console().print(
        f"{right:,} of {answers:,} answers are right; {solved:,} of {len(chosen):,} problems have one; {kept:,} "
        f"conversations in {command.out}",
        highlight=False,
        soft_wrap=True,
    )
