"""What is done with a mutated file, in a child process that its parent watches."""

import contextlib
import io
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it, which takes longer than a mutant
from rich.console import Console

from fathom.checkpoint.hf.model import load_model
from fathom.checkpoint.info import model_info
from fathom.checkpoint.training_state import load_state
from fathom.config import load_json
from fathom.data.chat_template import ChatTemplate
from fathom.data.corpus import DataConfig, scan_corpus, split_corpus
from fathom.data.tokenizer import load_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.train import pretrain
from fathom.train.errors import TrainingError
from fathom.train.run import Run
from tests.fuzz.mutation import mutate

ONE_LINE = (ValueError, OSError, ImportError, TrainingError)
"""What `fathom` prints in one line; anything else is a traceback."""

SLACK_BYTES = 48 << 20
"""Of memory beside twice the files: what torch, tokenizers and the allocator take for any model."""


class RunAcceptedError(Exception):
    """A run would go on: no error, but the end of what is looked at."""


def read_model(directory: Path) -> None:
    model_info(directory)
    model = load_model(directory)
    if model.config.vocab_size > 3:
        model(torch.tensor([[1, 2, 3]]), mtp=True)


def read_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("The 7 größer\n<｜User｜> 数据 😀", bos=True)
    tokenizer.decode([*ids, tokenizer.eos_id, 10**6])
    tokenizer.absent_ids(500)


def read_template(directory: Path) -> None:
    template = ChatTemplate(load_tokenizer(directory))
    template.encode([{"role": "user", "content": "hi <｜User｜>"}, {"role": "assistant", "content": "x"}])


def read_state(checkpoint: Path) -> None:
    load_state(checkpoint)


def read_run(directory: Path) -> None:
    def accepted(*arguments: object) -> None:
        raise RunAcceptedError

    pretrain.pretrain_step = accepted  # type: ignore[assignment]
    run = load_json(Run, directory / "run.json")
    console = Console(file=io.StringIO())
    with contextlib.suppress(RunAcceptedError):
        pretrain.train(run, directory, Ranks(0, 1, torch.device("cpu")), resume=True, console=console)


def read_corpus(directory: Path) -> None:
    config = DataConfig(corpus=str(directory), heldout=0.5)
    stats = scan_corpus(config)
    for document, _ in split_corpus(config, stats):
        assert isinstance(document.text, str)
    scan_corpus(replace(config, strict=True))


READERS: dict[str, Callable[[Path], None]] = {
    "model": read_model,
    "tokenizer": read_tokenizer,
    "template": read_template,
    "state": read_state,
    "run": read_run,
    "corpus": read_corpus,
}


def read_mutants(kind: str, directory: Path, files: list[str], seed: str, first: int, results: Connection) -> None:
    """Mutant after mutant of the files of a directory: send its number and file, then how it was taken."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["RUST_BACKTRACE"] = "0"  # symbols take 46 MiB
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    contents = {name: (directory / name).read_bytes() for name in files}
    size = sum(map(len, contents.values()))
    with contextlib.suppress(Exception):
        READERS[kind](directory)  # imports, and memory that is taken once
    number = first
    while True:
        rng = random.Random(f"{seed} {number}")
        name = rng.choice(files)
        results.send((number, name))
        (directory / name).write_bytes(mutate(name, contents[name], rng))
        before = _memory(reset=True)
        outcome = _outcome(READERS[kind], directory, name)
        grown = _memory() - before
        if grown > 2 * size + SLACK_BYTES:
            outcome = f"failure: {grown >> 20} MiB more memory for files of {size >> 10} kB; {outcome}"
        results.send(outcome)
        for restored, content in contents.items():
            (directory / restored).write_bytes(content)
        number += 1


def _outcome(reader: Callable[[Path], None], directory: Path, name: str) -> str:
    try:
        reader(directory)
    except ONE_LINE as error:
        message = str(error)
        if not any(named in message for named in (Path(name).name, directory.name, "chat template")):
            return f"failure: names no file: {type(error).__name__}: {message!r:.300}"
        return "refused"
    except BaseException as error:  # a panic of Rust's is no Exception
        return f"failure: a traceback: {type(error).__name__}: {error!s:.300}"
    return "taken"


def _memory(reset: bool = False) -> int:
    """The peak of this process's memory since it was reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
