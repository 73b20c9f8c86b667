"""A run whose loss or gradients stay infinite ends with a sentence."""

from pathlib import Path

from fathom.checkpoint.training_state import checkpoints
from fathom.train.errors import TrainingError
from fathom.train.progress import Progress
from fathom.train.step import TrainState


def check_divergence(
    state: TrainState, max_bad_steps: int, learning_rate: float, directory: Path, progress: Progress
) -> None:
    """Print that the last step was skipped, if it was; raise TrainingError after `max_bad_steps` in a row."""
    if not state.skipped_in_a_row:
        return
    progress.print(f"step {state.step}: loss or gradient is not finite; skipped ({state.skipped} so far)")
    if state.skipped_in_a_row >= max_bad_steps:
        saved = checkpoints(directory)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, up to step "
            f"{state.step}; {last}. Lower optimizer.learning-rate ({learning_rate}) or lengthen "
            "schedule.warmup-steps"
        )
