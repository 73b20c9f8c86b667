"""`fathom ablations`: run the ablations named on the command line, then write their results, plots and pages."""

import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from fathom.config import ConfigError
from fathom.data.corpus import STDLIB, DataConfig
from fathom.distributed.ranks import Ranks, data_parallel
from fathom.files import atomic_write
from fathom.lab.ablations.definitions import ABLATIONS
from fathom.lab.ablations.document import write_document
from fathom.lab.ablations.runner import Runner, default_jobs
from fathom.lab.ablations.scales import ALL
from fathom.lab.ablations.statistics import t_quantile
from fathom.lab.ablations.summary import Summary, path_of, summarize
from fathom.lab.ablations.trial import run_trial


@dataclass(frozen=True)
class AblationsCommand:
    """Run ablations of the architecture on small models; a command that was interrupted resumes where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m fathom ablations --scale gpu
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """attention, experts, balancing, prediction, routing, together; none: all of them."""
    scale: str = "minutes"
    """minutes: all ablations in under twenty minutes on two cores. hours: larger models. gpu: larger still."""
    out: Path = Path("runs/ablations")
    """Directory of finished runs; a run found there is not repeated."""
    docs: Path | None = None
    """Directory for the pages, results (ablations/) and plots (images/); none: --out."""
    seeds: int | None = None
    """Number of seeds; none: the scale's default."""
    jobs: int = field(default_factory=default_jobs)
    """Parallel runs, each of one thread on a CPU. Under torchrun 1: the runs are split among its processes."""
    corpus: str = STDLIB
    """Text to train on, as --data.corpus of `fathom train`."""
    page_only: bool = False
    """Run nothing; write the pages from the results in --docs."""


def run_ablations(command: AblationsCommand) -> None:
    """Run, summarise, write. Raises ConfigError for an unknown name or a value out of range."""
    _check(command)
    # A missing scipy should fail now, not after the runs.
    t_quantile(1)
    with data_parallel() as ranks:
        _run_and_write(command, ranks)


def _run_and_write(command: AblationsCommand, ranks: Ranks) -> None:
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


def _run(command: AblationsCommand, ranks: Ranks, console: Console) -> list[Summary]:
    scale, data = ALL[command.scale], DataConfig(corpus=command.corpus)
    seeds = range(command.seeds or scale.seeds)
    line = shlex.join(["--scale", scale.name, "--seeds", str(len(seeds)), "--corpus", data.corpus])
    runner = Runner(command.out, command.jobs, console, run_trial, ranks)
    ablations = [ablation for name, ablation in ABLATIONS.items() if name in (command.names or ABLATIONS)]
    finished = runner.run(ablations, scale, data, seeds)
    prepared = runner.prepare(scale, data)
    return [
        summarize(ablation, scale, *finished[ablation.name], prepared, f"fathom ablations {ablation.name} {line}")
        for ablation in ablations
    ]


def _check(command: AblationsCommand) -> None:
    for name in command.names:
        if name not in ABLATIONS:
            raise ConfigError(f"there is no ablation {name!r}; there are {', '.join(ABLATIONS)}")
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
