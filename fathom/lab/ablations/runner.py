"""Runs the studies: every run once, two or more side by side, nothing twice and nothing lost.

A run is known by the hash of its whole resolved variant, the text it reads and the version of torch; its record is a
JSON file of that name. What is there is not run again, so an interrupted study goes on where it stopped, and studies
share the runs they have in common. Processes that torchrun started share the runs out among them, and see by the files
what the others have made.
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

from fathom.config import atomic_write, to_json
from fathom.data.corpus import DataConfig
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.lab.ablations.design import TUNING_SEED, Entry, Found, Study
from fathom.lab.ablations.scales import Scale, base
from fathom.lab.ablations.trial import Record
from fathom.lab.ablations.variants import Variant, costs
from fathom.train.errors import TrainingError
from fathom.train.setup import tokenize_once
from fathom.train.signals import stop_signals

_ALONE = Ranks(0, 1, torch.device("cpu"))
_LOOK_SECONDS = 0.5
_FORMAT = 3
"""Raised when what a run measures changes its meaning: earlier records are then not used again."""


class InterruptedStudyError(TrainingError):
    """A signal asked to stop; what had finished is kept."""

    def __init__(self) -> None:
        super().__init__("stopped by a signal; the same command goes on with the runs that are missing")


@dataclass(frozen=True)
class Task:
    """One run to make."""

    name: str
    variant: Variant
    """With its seed."""


class Runner:
    """Makes runs, or finds them already made, in `directory`."""

    def __init__(
        self,
        directory: Path,
        jobs: int,
        console: Console,
        run: Callable[[Variant, Path], Record],
        ranks: Ranks = _ALONE,
    ) -> None:
        """`jobs`: runs side by side in this process's share. `ranks`: all of them call with the same studies."""
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; it must be at least 1")
        self._directory, self._jobs, self._console, self._run, self._ranks = directory, jobs, console, run, ranks
        self._records = directory / "runs"
        self._records.mkdir(parents=True, exist_ok=True)

    def studies(
        self, studies: Sequence[Study], scale: Scale, data: DataConfig, seeds: Sequence[int]
    ) -> dict[str, tuple[list[Entry], Found]]:
        """Every study's entries, in the order of its stages, and their records.

        The first stages of all studies run together, then the second ones: few moments leave a core without work.
        """
        prepared = self.prepare(scale, data)
        entries: dict[str, list[Entry]] = {study.name: [] for study in studies}
        found: dict[str, dict[str, dict[int, Record]]] = {study.name: {} for study in studies}
        for at in range(max(len(study.stages) for study in studies)):
            wanted = [
                (study.name, entry, seed)
                for study in studies
                for entry in (study.stages[at](scale, data, found[study.name]) if at < len(study.stages) else ())
                for seed in ((TUNING_SEED,) if entry.tuning else seeds)
            ]
            tasks = [Task(f"{n}: {e.name}, seed {seed}", e.variant.with_seed(seed)) for n, e, seed in wanted]
            for (name, entry, seed), record in zip(wanted, self.records(tasks, prepared), strict=True):
                if entry not in entries[name]:
                    entries[name].append(entry)
                found[name].setdefault(entry.name, {})[seed] = record
        return {study.name: (entries[study.name], found[study.name]) for study in studies}

    def prepare(self, scale: Scale, data: DataConfig) -> TokenizedCorpus:
        """Tokenise the text once for all runs."""
        return tokenize_once(base(scale, data).run, self._directory / f"data-{scale.vocabulary}", self._ranks)

    def records(self, tasks: Sequence[Task], prepared: TokenizedCorpus) -> list[Record]:
        """One record for each task. Raises InterruptedStudyError, and whatever a run raises."""
        paths = [self._path(task.variant, prepared) for task in tasks]
        different = dict(zip(paths, tasks, strict=True))
        # By place among all, whether made or not: another process may have made some since this one began.
        share = dict(islice(different.items(), self._ranks.rank, None, self._ranks.world))
        left = sum(not path.exists() for path in different)
        with _progress(self._console) as progress:
            bar = progress.add_task("", total=left, visible=bool(left))
            missing = {path: task for path, task in share.items() if not path.exists()}
            for path, record in self._made(missing, prepared.directory):
                record["costs"] = _costs(missing[path].variant)
                atomic_write(path, json.dumps(record) + "\n")
                progress.update(bar, advance=1, description=missing[path].name)
                if not self._console.is_terminal:
                    bits = record["results"]["bits_per_byte"]
                    self._console.print(f"{missing[path].name}: {bits:.4f} bits per byte", highlight=False)
            for others in _until_there(different):
                progress.update(bar, completed=left - others, description=f"{others} runs of other processes")
        return [json.loads(path.read_text()) for path in paths]

    def _path(self, variant: Variant, prepared: TokenizedCorpus) -> Path:
        known = {
            "format": _FORMAT,
            "variant": to_json(variant),
            "corpus": prepared.corpus_hash,
            "torch": torch.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return self._records / f"{digest[:24]}.json"

    def _made(self, missing: dict[Path, Task], data: Path) -> Iterator[tuple[Path, Record]]:
        """The missing runs as they finish."""
        with stop_signals() as stop_asked:
            if self._jobs == 1 or len(missing) < 2:
                for path, task in missing.items():
                    if stop_asked():
                        raise InterruptedStudyError
                    yield path, self._run(task.variant, data)
                return
            yield from self._side_by_side(missing, data, stop_asked)

    def _side_by_side(
        self, missing: dict[Path, Task], data: Path, stop_asked: Callable[[], bool]
    ) -> Iterator[tuple[Path, Record]]:
        # A forked child would inherit torch's threads and the GPU in a state neither survives.
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
                        raise InterruptedStudyError
            except BrokenProcessPool:
                # The terminal's interrupt reaches the workers as well, and may reach them first.
                if stop_asked():
                    raise InterruptedStudyError from None
                raise
            finally:
                if pending:
                    pool.shutdown(wait=False, cancel_futures=True)
                    for child in multiprocessing.active_children():
                        child.terminate()


def _until_there(paths: Iterable[Path]) -> Iterator[int]:
    """Wait for what other processes make; how many there still are. Where one fails, torchrun ends the others."""
    with stop_signals() as stop_asked:
        while others := sum(not path.exists() for path in paths):
            yield others
            if stop_asked():
                raise InterruptedStudyError
            time.sleep(_LOOK_SECONDS)


def _costs(variant: Variant) -> dict[str, float]:
    """What the variant takes, and what its configuration says that tables show."""
    run, counted = variant.run, costs(variant)
    tokens = run.train.steps * run.train.batch_size * run.train.sequence_length
    return {
        **asdict(counted),
        "tokens": tokens,
        "flops": tokens * counted.flops_per_token,
        "learning_rate": run.optimizer.learning_rate,
    }


def default_jobs() -> int:
    """Runs side by side: one per core; one on a GPU, or in each of torchrun's processes."""
    if torch.cuda.is_available() or "WORLD_SIZE" in os.environ:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}", style="dim"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
