"""Checkpoints of a run: each is a Hugging Face model directory with the training state in a subdirectory.

    RUN/checkpoints/step-000200/            config.json, model.safetensors, tokenizer: opens anywhere
    RUN/checkpoints/step-000200/ema/        the exponential moving average of the weights, also a model directory
    RUN/checkpoints/step-000200/training_state/   state.pt, and the digests of all files
    RUN/model                               link to the newest complete checkpoint

A checkpoint is written under a hidden name, flushed, and renamed last, and renamed before it is deleted: one that has
its final name is complete, no matter when the process was killed.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.checkpoint.digests import DIGESTS, verify_digests, write_digests
from fathom.checkpoint.hf.model import load_model, save_model
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.checkpoint.hf.weights import CheckpointWeights
from fathom.data.tokenizer import Tokenizer
from fathom.files import atomic_directory, remove_leftovers, sync
from fathom.model.transformer import Model

_NAME = re.compile(r"step-(\d{6,})")
_STATE = Path("training_state") / "state.pt"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if checkpoint_step(path) is not None]
    return sorted(found, key=checkpoint_step)  # type: ignore[arg-type]  # no None is left


def checkpoint_step(directory: Path) -> int | None:
    """The number of optimizer steps before a checkpoint; None for a directory that is not named like one."""
    match = _NAME.fullmatch(directory.name)
    return None if match is None else int(match[1])


def newest_whole_checkpoint(run: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written, to which RUN/model then points; None without any.

    Newer ones are damaged: they are reported, and renamed so that they no longer count. Raises CheckpointError where
    none is whole.
    """
    damaged: dict[Path, CheckpointError] = {}
    for checkpoint in reversed(checkpoints(run)):
        try:
            _verify(checkpoint)
        except CheckpointError as error:
            damaged[checkpoint] = error
            continue
        for path, problem in damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            report(f"{problem}; set aside as {aside.name}")
        _replace_link(run / "model", checkpoint)
        return checkpoint
    if damaged:
        raise CheckpointError(f"{run} has no whole checkpoint: " + "; ".join(map(str, damaged.values())))
    return None


def _verify(checkpoint: Path) -> None:
    """Raise CheckpointError for a damaged checkpoint; in one of an earlier version, without digests, by its headers."""
    if (checkpoint / DIGESTS).exists():
        verify_digests(checkpoint)
    else:
        CheckpointWeights(checkpoint)
        load_state(checkpoint)


def save_checkpoint(
    run: Path,
    step: int,
    model: Model,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    ema: dict[str, Tensor] | None,
    keep_last: int,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of `step`, point RUN/model at it, and delete all but the newest `keep_last`.

    `state` consists of tensors, numbers, strings, lists and dicts; `ema` is the moving average of the parameters.
    `write_more` is called with the checkpoint's directory while it is unfinished, and adds files of its own.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    if final.exists():
        return final
    with atomic_directory(final) as staging:
        save_model(model, staging, tokenizer)
        if ema is not None:
            with _swapped_weights(model, ema):
                save_model(model, staging / "ema", tokenizer)
        if write_more is not None:
            write_more(staging)
        (staging / _STATE).parent.mkdir()
        with open(staging / _STATE, "wb") as file:  # given a path, torch.save hides why it failed
            torch.save(state, file)
        sync(staging / _STATE)
        write_digests(staging)
    _replace_link(run / "model", final)
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old.tmp")))
    return final


def remove_unfinished(run: Path) -> None:
    """Delete what processes that were killed while saving left behind; none may be saving now."""
    remove_leftovers(run, "model", "run.json", "metrics.jsonl", "loads.jsonl", "evaluation.json")
    remove_leftovers(run / "checkpoints", "step-*")


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint; only plain data is unpickled. Raises CheckpointError for a damaged file."""
    file = checkpoint / _STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the operations of a damaged pickle lead to
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not state.keys() >= {"optimizers", "skipped", "skipped_in_a_row"}:
        raise CheckpointError(f"{file} holds no state of a training run")
    return state


def load_ema(checkpoint: Path, device: torch.device) -> dict[str, Tensor]:
    """The moving average of the weights that was saved with a checkpoint, by parameter name."""
    model = load_model(checkpoint / "ema", device=device)
    return {name: p.detach() for name, p in model.named_parameters()}


@contextmanager
def _swapped_weights(model: Model, weights: dict[str, Tensor]) -> Iterator[None]:
    """The model has these weights within the block, and its own again after it."""
    own = {name: p.data for name, p in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]


def _replace_link(link: Path, target: Path) -> None:
    """Point `link` at `target` atomically."""
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    os.replace(temporary, link)
