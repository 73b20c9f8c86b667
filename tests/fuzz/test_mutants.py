"""Mutated checkpoints, tokenizers, templates, runs and corpora: one line says what is wrong, in time and in memory.

A child process reads them; this one ends it where a mutant takes more than five seconds of processor time.
"""

import gzip
import json
import lzma
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

from fathom.checkpoint.digests import DIGESTS
from fathom.checkpoint.hf.model import save_model
from fathom.data.tokenizer import save_tokenizer, train_tokenizer
from fathom.distributed.ranks import Ranks
from fathom.model.transformer import Model
from fathom.train.pretrain import train
from fathom.train.run import Run
from tests.fuzz.campaign import campaign_seed, seconds
from tests.fuzz.child import start
from tests.fuzz.readers import READERS, read_mutants

psutil = pytest.importorskip("psutil", reason="processor time is read by psutil")
pytestmark = pytest.mark.slow

QUICK_SECONDS = 8.0
HANG_SECONDS = 5.0
LEAST = 20
"""Mutants, also where the machine is too busy for them in the seconds that there are."""
TEXT = "The number is 12, größer als 7. 数据 😀\n def f(x): return [x, 'y']\n"


def tokenizer_files(directory: Path) -> list[str]:
    save_tokenizer(train_tokenizer([TEXT * 40], 320), directory)
    return ["tokenizer.json", "tokenizer_config.json"]


def model_files(directory: Path, run: Run) -> list[str]:
    torch.manual_seed(0)
    save_model(Model(run.model), directory, max_shard_size=100_000)
    return ["config.json", "model.safetensors.index.json", *(path.name for path in directory.glob("*.safetensors"))]


def run_files(directory: Path, run: Run) -> list[str]:
    """Half of a run whose checkpoint has no digests, so that its files are read."""
    half = replace(run, train=replace(run.train, steps=3, save_every=0, final_eval_sequences=1))
    train(half, directory, Ranks(0, 1, torch.device("cpu")))
    newest = (directory / "model").resolve()
    (newest / DIGESTS).unlink()
    record = json.loads((directory / "run.json").read_text())
    record["train"]["steps"] = 6
    (directory / "run.json").write_text(json.dumps(record))
    inside = ["config.json", "model.safetensors", "training_state/state.pt", "tokenizer.json", "tokenizer_config.json"]
    outside = ["run.json", "data/meta.json", "data/train.bin", "data/tokenizer.json", "metrics.jsonl", "loads.jsonl"]
    return [*outside, *outside[:2], *(str((newest / name).relative_to(directory)) for name in inside)]


def state_files(directory: Path, run: Run) -> list[str]:
    run_files(directory / "run", run)
    shutil.copytree((directory / "run" / "model").resolve() / "training_state", directory / "training_state")
    shutil.rmtree(directory / "run")
    return ["training_state/state.pt"]


def corpus_files(directory: Path) -> list[str]:
    rows = [{"text": TEXT * (number + 1), "other": number} for number in range(5)]
    csv = "text,other\n" + "".join(f'"a, ""quoted"" text\nof {number} lines",{number}\n' for number in range(9))
    contents = {
        "a.txt": TEXT.encode(),
        "b.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows),
        "c.json": json.dumps(rows).encode(),
        "d.csv": csv.encode(),
        "e.txt.gz": gzip.compress(TEXT.encode() * 9),
        "f.jsonl.xz": lzma.compress(json.dumps(rows[0]).encode() + b"\n"),
        "g.txt": TEXT.encode("utf-16"),
    }
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return [*contents]


def campaign(kind: str, directory: Path, files: list[str], until: float) -> tuple[Counter[str], list[str]]:
    """Read mutants until a moment of time.monotonic(); how they were taken, and what must not have happened."""
    seed, seen, failures, number = f"{campaign_seed()} {kind}", Counter[str](), [], 0
    print(f"{kind}: FUZZ_SEED={campaign_seed()}")
    while time.monotonic() < until or seen.total() < LEAST:
        ours, theirs = Pipe(duplex=False)
        child = start(read_mutants, kind, directory, files, seed, number, theirs)
        theirs.close()
        process = psutil.Process(child.pid)
        ended = ""
        while not ended and (time.monotonic() < until or seen.total() < LEAST):
            try:
                number, name = ours.recv()
                began = process.cpu_times()
                while not ours.poll(0.2):
                    now = process.cpu_times()
                    if now.user + now.system - began.user - began.system > HANG_SECONDS:
                        ended = f"more than {HANG_SECONDS} s"
                        break
                outcome = f"failure: {ended}" if ended else ours.recv()
            except (EOFError, psutil.NoSuchProcess):
                child.join()
                ended = f"failure: the process ended with {child.exitcode}"
                outcome = ended
            seen[outcome.partition(":")[0]] += 1
            if outcome.startswith("failure"):
                failures.append(f"FUZZ_SEED={campaign_seed()} {kind} {number}, {name}: {outcome}")
        child.kill()
        child.join()
        number += 1
        if len(failures) > 50:
            break
    return seen, failures


@pytest.mark.parametrize("kind", READERS)
def test_mutants(kind: str, tiny_run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "mutant"
    make: dict[str, Callable[[], list[str]]] = {
        "model": lambda: model_files(directory, tiny_run),
        "tokenizer": lambda: tokenizer_files(directory),
        "template": lambda: tokenizer_files(directory)[1:],
        "state": lambda: state_files(directory, tiny_run),
        "run": lambda: run_files(directory, tiny_run),
        "corpus": lambda: corpus_files(directory),
    }
    files = make[kind]()
    seen, failures = campaign(kind, directory, files, time.monotonic() + seconds(QUICK_SECONDS) / len(READERS))
    print(f"{kind}: {dict(seen)}")
    assert not failures, f"{len(failures)} of {seen.total()}:\n" + "\n".join(failures[:60])
    assert seen["refused"] > 3
