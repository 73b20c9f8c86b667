"""SIGKILL at any moment of a run, again and again: it always goes on, and ends with the bits of an undisturbed one.

Half of the kills come right before a change to the file system, so that every step of tokenising, evaluating, saving,
linking and deleting is cut off from the next sooner or later; the others at any time.
"""

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fathom.checkpoint.digests import verify_digests
from fathom.checkpoint.training_state import checkpoints, load_state
from fathom.metrics import read_metrics
from fathom.train.run import Run
from tests.fuzz.campaign import draws
from tests.fuzz.child import start, train_until

pytestmark = pytest.mark.slow

QUICK_SECONDS = 8.0
KILLS_OF_A_RUN = 3
HANG_SECONDS = 600.0
"""Of a run that takes one second of processor time; the machine may be busy."""


def final(out: Path) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
    """Weights, averages and moments by name, and every recorded value that is not a time."""
    newest = checkpoints(out)[-1]
    tensors = {}
    for part in ("", "ema"):
        loaded = load_file(newest / part / "model.safetensors")
        tensors |= {f"{part} {name}": tensor for name, tensor in loaded.items()}
    state = load_state(newest)
    for number, optimizer in enumerate(state["optimizers"]):
        for parameter, moments in optimizer["state"].items():
            tensors |= {f"{number} {parameter} {key}": torch.as_tensor(value) for key, value in moments.items()}
    timed = ("tokens_per_second", "mfu")
    metrics = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(out / "metrics.jsonl")]
    return tensors, metrics, read_metrics(out / "loads.jsonl")


def check_whole(out: Path) -> None:
    """What holds at any moment: a checkpoint that has its name is whole, and RUN/model leads to one."""
    for checkpoint in checkpoints(out):
        verify_digests(checkpoint)
    if (out / "model").is_symlink():
        assert (out / "model" / "config.json").exists()


def attempt(run: Run, out: Path, log: Path, seconds: float | None = None, change: int | None = None) -> bool:
    """Train in a child, killed after some seconds or right before a change; whether it was killed."""
    child = start(train_until, run, out, (out / "run.json").exists(), log, change)
    child.join(HANG_SECONDS if seconds is None else seconds)
    if seconds is None:
        assert child.exitcode is not None, f"hangs: {log.read_text()}"
    child.kill()
    child.join()
    assert child.exitcode in (0, -9), log.read_text()
    return child.exitcode == -9


def test_kills_at_random_moments(tiny_run: Run, tmp_path: Path) -> None:
    run = replace(
        tiny_run,
        train=replace(tiny_run.train, steps=6, save_every=2, eval_every=3, final_eval_sequences=2),
        optimizer=replace(tiny_run.optimizer, ema_decay=0.9),
    )
    log = tmp_path / "log.txt"
    assert not attempt(run, tmp_path / "whole", log)
    began = time.monotonic()
    assert not attempt(run, tmp_path / "again", log)
    duration = time.monotonic() - began
    expected, changes = final(tmp_path / "whole"), int((tmp_path / "changes").read_text())
    assert changes > 100
    seen: Counter[str] = Counter()
    for seed, rng in draws("kills", QUICK_SECONDS):
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(KILLS_OF_A_RUN):
            if rng.random() < 0.5:
                killed = attempt(run, out, log, change=1 + int(changes * rng.random() ** 2))
            else:
                killed = attempt(run, out, log, seconds=duration * rng.random() ** 2)
            check_whole(out)
            seen["killed"] += killed
            seen["before the first checkpoint" if not checkpoints(out) else "after it"] += killed
            if not killed:
                break
        assert not attempt(run, out, log), seed
        (weights, *records), (expected_weights, *expected_records) = final(out), expected
        assert weights.keys() == expected_weights.keys()
        differing = [name for name in weights if not torch.equal(weights[name], expected_weights[name])]
        assert not differing and records == expected_records, seed
        assert json.loads((out / "evaluation.json").read_text())["step"] == 6
        assert (out / "model").resolve() == checkpoints(out)[-1].resolve(), seed
        leftovers = [path for path in out.rglob("*") if path.name.endswith(".tmp")]
        assert not leftovers, seed
        seen["finished"] += 1
        if seen["finished"] % 25 == 0:
            print(dict(seen), flush=True)
    print(dict(seen))
    assert seen["killed"] >= 1
