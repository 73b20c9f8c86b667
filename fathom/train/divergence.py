"""A run whose loss or gradients stay infinite, or whose loss stays far above its start, ends with a sentence."""

from pathlib import Path

from fathom.checkpoint.training_state import checkpoints
from fathom.train.errors import TrainingError
from fathom.train.progress import Progress
from fathom.train.step import TrainState

_HIGH_STEPS = 100
"""Spikes, which a run recovers from, are shorter."""
_HIGH_NATS, _HIGH_RATIO = 3.0, 1.5
"""Above the first step's loss: by so many nats, and so many times as high."""


def check_divergence(
    state: TrainState, max_bad_steps: int, learning_rate: float, directory: Path, progress: Progress
) -> None:
    """Print that the last step was skipped, if it was; raise TrainingError after `max_bad_steps` in a row."""
    if reason := bad_steps(state, max_bad_steps, progress):
        raise diverged(reason, learning_rate, directory)


def bad_steps(state: TrainState, most: int, progress: Progress) -> str | None:
    """Print that the last step was skipped, if it was; returns why the run should end after `most` in a row."""
    if not state.skipped_in_a_row:
        return None
    progress.print(f"step {state.step}: loss or gradient is not finite; skipped ({state.skipped} so far)")
    if state.skipped_in_a_row < most:
        return None
    return f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step {state.step}"


def high_loss(state: TrainState, loss: float) -> str | None:
    """Count a step's loss where it is far above that of the first step; returns why the run should end, if it should.

    Losses that are not finite are no part of this.
    """
    if state.skipped_in_a_row:
        return None
    if state.first_loss is None:
        state.first_loss = loss
    start = state.first_loss
    state.high_in_a_row = state.high_in_a_row + 1 if loss > max(start + _HIGH_NATS, start * _HIGH_RATIO) else 0
    if state.high_in_a_row < _HIGH_STEPS:
        return None
    return (
        f"the loss was far above its start ({start:.2f}) for {_HIGH_STEPS} steps, up to step {state.step}: {loss:.2f}"
    )


def diverged(reason: str, learning_rate: float, directory: Path) -> TrainingError:
    """The error that ends the run: `reason`, what is left of it, and what would help."""
    saved = checkpoints(directory)
    last = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
    return TrainingError(
        f"{reason}; {last}. Lower optimizer.learning-rate ({learning_rate}) or lengthen schedule.warmup-steps"
    )
