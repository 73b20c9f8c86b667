"""Runs the ablations: every run once, several in parallel, finished ones kept.

A run is identified by the hash of its variant, its text and the version of torch; its record is a JSON file of that
name. A record that exists is not made again, so an interrupted ablation resumes where it stopped, and ablations share
the runs they have in common. The processes of torchrun split the runs among themselves and find the records of the
others as files.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fathom.config import to_json
from fathom.data.corpus import DataConfig
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.files import atomic_write
from fathom.lab.ablations.design import TUNING_SEED, Ablation, Entry, Found
from fathom.lab.ablations.scales import Scale, base
from fathom.lab.ablations.trial import Record
from fathom.lab.ablations.variants import Variant, costs
from fathom.train.errors import TrainingError
from fathom.train.setup import tokenize_once
from fathom.train.signals import stop_signals

_SINGLE_PROCESS = Ranks(0, 1, torch.device("cpu"))
_POLL_SECONDS = 0.5
_FORMAT = 3
"""Incremented when a measurement changes its meaning, so that earlier records are not used."""


class InterruptedAblationError(TrainingError):
    """Stopped by a signal; finished runs are kept."""

    def __init__(self) -> None:
        super().__init__("stopped by a signal; the same command resumes with the runs that are missing")


@dataclass(frozen=True)
class Task:
    """One run."""

    name: str
    variant: Variant
    """With its seed set."""


class Runner:
    """Makes runs, or finds their records, in `directory`."""

    def __init__(
        self,
        directory: Path,
        jobs: int,
        console: Console,
        run: Callable[[Variant, Path], Record],
        ranks: Ranks = _SINGLE_PROCESS,
    ) -> None:
        """`jobs`: parallel runs of this process. `ranks`: every rank must call with the same ablations."""
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; it must be at least 1")
        self._directory, self._jobs, self._console, self._run, self._ranks = directory, jobs, console, run, ranks
        self._records = directory / "runs"
        self._records.mkdir(parents=True, exist_ok=True)

    def run(
        self, ablations: Sequence[Ablation], scale: Scale, data: DataConfig, seeds: Sequence[int]
    ) -> dict[str, tuple[list[Entry], Found]]:
        """Every ablation's entries, in the order of its stages, and their records.

        The first stages of all ablations run together, then the second ones, so that cores are rarely idle.
        """
        prepared = self.prepare(scale, data)
        entries: dict[str, list[Entry]] = {ablation.name: [] for ablation in ablations}
        found: dict[str, dict[str, dict[int, Record]]] = {ablation.name: {} for ablation in ablations}
        for at in range(max(len(ablation.stages) for ablation in ablations)):
            planned = [
                (ablation.name, entry, seed)
                for ablation in ablations
                for entry in (
                    ablation.stages[at](scale, data, found[ablation.name]) if at < len(ablation.stages) else ()
                )
                for seed in ((TUNING_SEED,) if entry.tuning else seeds)
            ]
            tasks = [Task(f"{n}: {e.name}, seed {seed}", e.variant.with_seed(seed)) for n, e, seed in planned]
            for (name, entry, seed), record in zip(planned, self.records(tasks, prepared), strict=True):
                if entry not in entries[name]:
                    entries[name].append(entry)
                found[name].setdefault(entry.name, {})[seed] = record
        return {ablation.name: (entries[ablation.name], found[ablation.name]) for ablation in ablations}

    def prepare(self, scale: Scale, data: DataConfig) -> TokenizedCorpus:
        """Tokenise the text once for all runs."""
        return tokenize_once(base(scale, data).run, self._directory / f"data-{scale.vocabulary}", self._ranks)

    def records(self, tasks: Sequence[Task], prepared: TokenizedCorpus) -> list[Record]:
        """One record per task. Raises InterruptedAblationError, and whatever a run raises."""
        paths = [self._path(task.variant, prepared) for task in tasks]
        different = dict(zip(paths, tasks, strict=True))
        # Split by position among all tasks, finished or not: another process may have finished some meanwhile.
        share = dict(islice(different.items(), self._ranks.rank, None, self._ranks.world))
        left = sum(not path.exists() for path in different)
        with _progress(self._console) as progress:
            bar = progress.add_task("", total=left, visible=bool(left))
            missing = {path: task for path, task in share.items() if not path.exists()}
            for path, record in self._run_missing(missing, prepared.directory):
                record["costs"] = _costs(missing[path].variant)
                atomic_write(path, json.dumps(record) + "\n")
                progress.update(bar, advance=1, description=missing[path].name)
                if not self._console.is_terminal:
                    bits = record["results"]["bits_per_byte"]
                    self._console.print(f"{missing[path].name}: {bits:.4f} bits per byte", highlight=False)
            for others in _wait_for(different):
                progress.update(bar, completed=left - others, description=f"{others} runs of other processes")
        return [json.loads(path.read_text()) for path in paths]

    def _path(self, variant: Variant, prepared: TokenizedCorpus) -> Path:
        identity = {
            "format": _FORMAT,
            "variant": to_json(variant),
            "corpus": prepared.corpus_hash,
            "torch": torch.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self._records / f"{digest[:24]}.json"

    def _run_missing(self, missing: dict[Path, Task], data: Path) -> Iterator[tuple[Path, Record]]:
        """The missing runs as they finish."""
        with stop_signals() as stop_asked:
            if self._jobs == 1 or len(missing) < 2:
                for path, task in missing.items():
                    if stop_asked():
                        raise InterruptedAblationError
                    yield path, self._run(task.variant, data)
                return
            yield from self._run_in_parallel(missing, data, stop_asked)

    def _run_in_parallel(
        self, missing: dict[Path, Task], data: Path, stop_asked: Callable[[], bool]
    ) -> Iterator[tuple[Path, Record]]:
        # Neither torch's threads nor a CUDA context survive a fork.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._jobs, mp_context=context) as pool:
            pending: dict[Future[Record], Path] = {
                pool.submit(self._run, task.variant, data): path for path, task in missing.items()
            }
            try:
                while pending:
                    done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield pending.pop(future), future.result()
                    if stop_asked():
                        raise InterruptedAblationError
            except BrokenProcessPool:
                # The terminal's interrupt reaches the workers as well, and may reach them first.
                if stop_asked():
                    raise InterruptedAblationError from None
                raise
            finally:
                if pending:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for child in multiprocessing.active_children():
                        child.terminate()


def _wait_for(paths: Iterable[Path]) -> Iterator[int]:
    """Wait for the records of other processes; yields how many are missing. If one fails, torchrun ends the others."""
    with stop_signals() as stop_asked:
        while others := sum(not path.exists() for path in paths):
            yield others
            if stop_asked():
                raise InterruptedAblationError
            time.sleep(_POLL_SECONDS)


def _costs(variant: Variant) -> dict[str, float]:
    """The costs of the variant, and the settings of its configuration that tables show."""
    run, counted = variant.run, costs(variant)
    tokens = run.train.steps * run.train.batch_size * run.train.sequence_length
    return {
        **asdict(counted),
        "tokens": tokens,
        "flops": tokens * counted.flops_per_token,
        "learning_rate": run.optimizer.learning_rate,
    }


def default_jobs() -> int:
    """Parallel runs: one per core; one on a GPU, or in each process of torchrun."""
    if torch.cuda.is_available() or "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", style="dim"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
