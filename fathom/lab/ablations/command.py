"""`fathom study`: run the studies that are asked for, then write their summaries, pictures and pages."""

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fathom.config import ConfigError, atomic_write
from fathom.data.corpus import STDLIB, DataConfig
from fathom.distributed.ranks import Ranks, data_parallel
from fathom.lab.ablations.document import write_document
from fathom.lab.ablations.runner import Runner, default_jobs
from fathom.lab.ablations.scales import ALL
from fathom.lab.ablations.statistics import t_quantile
from fathom.lab.ablations.studies import STUDIES
from fathom.lab.ablations.summary import Summary, path_of, summarize
from fathom.lab.ablations.trial import run_trial


@dataclass(frozen=True)
class StudyCommand:
    """Measure the architecture's claims in miniature; an interrupted command goes on where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m fathom study --scale gpu
    """

    claims: tyro.conf.Positional[tuple[str, ...]] = ()
    """attention, experts, balancing, prediction, routing, together; none: all of them."""
    scale: str = "minutes"
    """minutes: all claims in under twenty minutes on two cores. hours: larger models. gpu: larger still."""
    out: Path = Path("runs/study")
    """Where finished runs are kept, so that none is made twice."""
    docs: Path | None = None
    """Where pages, results (claims/) and pictures (images/) are written; none: --out."""
    seeds: int | None = None
    """How many seeds; none: the scale's own number."""
    jobs: int = field(default_factory=default_jobs)
    """Runs side by side, each of one thread on a CPU. Under torchrun 1: its processes share the runs out."""
    corpus: str = STDLIB
    """Text to train on, as --data.corpus of `fathom train`."""
    page_only: bool = False
    """Run nothing: write the pages from the results that lie in --docs."""


def run_studies(command: StudyCommand) -> None:
    """Run, summarise, write. Raises ConfigError for names and numbers that do not exist."""
    _check(command)
    # What is missing should show now, not after the runs.
    t_quantile(1)
    with data_parallel() as ranks:
        _study(command, ranks)


def _study(command: StudyCommand, ranks: Ranks) -> None:
    console = Console(quiet=not ranks.is_main)
    docs = command.docs or command.out
    summaries = [] if command.page_only else _run(command, ranks, console)
    if not ranks.is_main:
        return
    for summary in summaries:
        path = path_of(docs, command.scale, summary["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(summary, indent=1) + "\n")
    if summaries:
        console.print(_table(summaries))
    for page in write_document(docs):
        console.print(f"page      {page}", highlight=False)


def _run(command: StudyCommand, ranks: Ranks, console: Console) -> list[Summary]:
    scale, data = ALL[command.scale], DataConfig(corpus=command.corpus)
    seeds = range(command.seeds or scale.seeds)
    line = shlex.join(["--scale", scale.name, "--seeds", str(len(seeds)), "--corpus", data.corpus])
    runner = Runner(command.out, command.jobs, console, run_trial, ranks)
    studies = [study for name, study in STUDIES.items() if name in (command.claims or STUDIES)]
    finished = runner.studies(studies, scale, data, seeds)
    prepared = runner.prepare(scale, data)
    return [
        summarize(study, scale, *finished[study.name], prepared, f"fathom study {study.name} {line}")
        for study in studies
    ]


def _check(command: StudyCommand) -> None:
    for name in command.claims:
        if name not in STUDIES:
            raise ConfigError(f"there is no claim {name!r}; there are {', '.join(STUDIES)}")
    if command.scale not in ALL:
        raise ConfigError(f"--scale is {command.scale!r}; it must be one of {', '.join(ALL)}")
    if command.seeds is not None and command.seeds < 1:
        raise ConfigError(f"--seeds is {command.seeds}; it must be at least 1")
    if command.jobs > 1 and "WORLD_SIZE" in os.environ:
        raise ConfigError(f"--jobs is {command.jobs}; under torchrun it must be 1: start more processes instead")


def _table(summaries: list[Summary]) -> Table:
    table = Table("claim", "verdict")
    for summary in summaries:
        table.add_row(summary["claim"], summary["verdict"], end_section=True)
    return table
