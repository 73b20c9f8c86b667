"""Before the first step: open the run's directory, print what the run will take, refuse what cannot work."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from fathom.checkpoint.training_state import remove_unfinished
from fathom.config import ConfigError, load_json
from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.files import exclusive_lock
from fathom.ops import cpu
from fathom.runtime.hardware import compile_unavailable_reason, free_memory
from fathom.train.errors import TrainingError
from fathom.train.estimate import Estimate, estimate, memory_refusal
from fathom.train.progress import Progress, duration
from fathom.train.resume import resumed_run
from fathom.train.run import Run
from fathom.train.schedule import batch_sizes
from fathom.train.setup import compute_dtype, with_initial_model


@contextmanager
def open_directory(run: Run, directory: Path, ranks: Ranks, resume: bool) -> Iterator[Run]:
    """The run to train in `directory`, which other processes are kept out of within the block."""
    with locked_directory(directory, ranks, resume) as record:
        yield resumed_run(load_json(Run, record), run, record) if resume else with_initial_model(run)


@contextmanager
def locked_directory(directory: Path, ranks: Ranks, resume: bool) -> Iterator[Path]:
    """Keep other processes out of a run's directory within the block; gives the path of its run.json.

    Raises ConfigError where there is no run to resume, or already one where a new one shall start.
    """
    record = directory / "run.json"
    if resume and not record.exists():
        raise ConfigError(f"{directory} holds no run to resume: {record} does not exist")
    if directory.resolve() == Path(directory.resolve().anchor):
        raise ConfigError(f"--out is {str(directory)!r}, the root of the file system; name a directory for the run")
    with _lock(directory) if ranks.is_main else nullcontext():
        if record.exists() and not resume:
            raise ConfigError(f"{directory} already holds a run: continue it with --resume, or choose another --out")
        yield record


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(directory / ".lock"):
        remove_unfinished(directory)
        yield


def preflight(
    run: Run,
    corpus: TokenizedCorpus,
    peak_flops: float,
    arena_problem: str | None,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Print size, data and needs of a resolved run; raise TrainingError where memory or a compiler is missing."""
    sequences = int(batch_sizes(run.train).sum())
    needs = estimate(run, compute_dtype(run), sequences, ranks.device)
    if refusal := memory_refusal(run, needs, free_memory(ranks.device)):
        raise TrainingError(refusal)
    for line in _description(run, corpus, needs, peak_flops, ranks.world):
        progress.print(line)
    lacking = compile_unavailable_reason(ranks.device)
    if run.train.compile == "on" and lacking:
        raise TrainingError(f"train.compile is on, but {lacking}")
    if ranks.device.type == "cpu" and (problem := cpu.missing()):
        progress.print(f"the CPU kernels are missing, so plain torch runs instead, more slowly: {problem}")
    elif ranks.device.type == "cpu" and arena_problem:
        progress.print(f"tensors have no arena, so fragmentation takes memory: {arena_problem}")


def _description(run: Run, corpus: TokenizedCorpus, needs: Estimate, peak_flops: float, world: int) -> list[str]:
    counts = run.model.parameter_counts()
    return [
        f"model  {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active per token"
        f" (+ {counts.mtp / 1e6:.1f}M in {run.model.num_nextn_predict_layers} MTP module(s))",
        f"data   {corpus.train_tokens:,} training tokens in {corpus.train_documents:,} documents, "
        f"{corpus.valid_tokens:,} held out; the run takes {needs.tokens:,}",
        *_oddities(run, corpus),
        f"needs  about {needs.memory / 2**30:.2f} GiB on each of {world} rank(s) and "
        f"{duration(needs.seconds(peak_flops))}; computing in {run.train.compute_dtype}, {peak_flops / 1e9:.0f} "
        "GFLOP/s at best",
    ]


def _oddities(run: Run, corpus: TokenizedCorpus) -> list[str]:
    """What of the corpus was left out, with the first reasons, and rows of the vocabulary that no text needs."""
    lines = []
    if corpus.skipped:
        lines.append(f"       {corpus.skipped:,} files or rows cannot be read and are left out; in data/meta.json why:")
        lines += [f"         {reason}" for reason in corpus.skipped_examples[:5]]
    if corpus.vocab_size < run.model.vocab_size:
        lines.append(
            f"       the tokenizer has {corpus.vocab_size:,} tokens, model.vocab_size is {run.model.vocab_size:,}: the "
            "rest stays untrained"
        )
    return lines
