"""Checkpoints of a run: each is a Hugging Face model directory with the training state in a subdirectory.

    RUN/checkpoints/step-000200/            config.json, model.safetensors, tokenizer: opens anywhere
    RUN/checkpoints/step-000200/ema/        the exponential moving average of the weights, also a model directory
    RUN/checkpoints/step-000200/training_state/state.pt
    RUN/model                               link to the newest complete checkpoint

A checkpoint is written under a hidden name, flushed, and renamed last: one that has its final name is complete, no
matter when the process was killed.
"""

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.checkpoint.hf.model import load_model, save_model
from fathom.checkpoint.hf.safetensors_io import CheckpointError
from fathom.data.tokenizer import Tokenizer
from fathom.files import sync
from fathom.model.transformer import Model

_NAME = re.compile(r"step-(\d{6,})")
_STATE = Path("training_state") / "state.pt"


def checkpoints(run: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps before a checkpoint; raises CheckpointError for any other directory."""
    step = checkpoint_step(checkpoint)
    if step is None:
        raise CheckpointError(f"{checkpoint} is not named like a checkpoint (step-000200)")
    return step


def checkpoint_step(directory: Path) -> int | None:
    """As `step_of`, but None for a directory that is not named like a checkpoint."""
    match = _NAME.fullmatch(directory.name)
    return None if match is None else int(match[1])


def save_checkpoint(
    run: Path,
    step: int,
    model: Model,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    ema: dict[str, Tensor] | None,
    keep_last: int,
) -> Path:
    """Write the checkpoint of `step`, point RUN/model at it, and delete all but the newest `keep_last`.

    `state` consists of tensors, numbers, strings, lists and dicts; `ema` is the moving average of the parameters.
    """
    final = run / "checkpoints" / f"step-{step:06d}"
    if final.exists():
        return final
    staging = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    save_model(model, staging, tokenizer)
    if ema is not None:
        with _swapped_weights(model, ema):
            save_model(model, staging / "ema", tokenizer)
    (staging / _STATE).parent.mkdir()
    with open(staging / _STATE, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(staging, final)
    sync(final.parent)
    _replace_link(run / "model", final)
    for old in checkpoints(run)[:-keep_last]:
        shutil.rmtree(old)
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint; only plain data is unpickled."""
    file = checkpoint / _STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
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
