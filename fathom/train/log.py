"""The record of a run on disk: run.json, metrics.jsonl, loads.jsonl and evaluation.json."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fathom.config import save_json
from fathom.files import atomic_write
from fathom.metrics import JsonLines, MetricsLog
from fathom.train.evaluation import EvalResult
from fathom.train.run import Run
from fathom.train.schedule import hyperparameters
from fathom.train.step import StepMetrics

_LOAD_RECORDS = 100
"""Expert loads are recorded about this many times in a run."""


class RunLog:
    """Writes run.json, and appends steps and evaluations; what a resumed run will write again is dropped first."""

    def __init__(self, directory: Path, run: Run, step: int) -> None:
        self._directory = directory
        save_json(run, directory / "run.json")
        self._metrics = MetricsLog(directory, tensorboard=run.train.tensorboard)
        self._metrics.truncate_after(step)
        self._loads = JsonLines(directory / "loads.jsonl")
        self._loads.truncate_after(step)
        self._every = max(1, run.train.steps // _LOAD_RECORDS)

    def stepped(self, step: int, values: dict[str, Any], tokens_per_expert_LE: Tensor) -> None:
        """Record a step (they count from 1) and, a hundred times a run, every expert's load."""
        self._metrics.write(step, **values)
        if step == 1 or step % self._every == 0:
            self._loads.append({"step": step, "loads": tokens_per_expert_LE.tolist()})

    def evaluated(self, step: int, result: EvalResult) -> None:
        """Record an evaluation; evaluation.json holds the newest."""
        self._metrics.write(step, **result.metrics())
        content = json.dumps({"step": step, **result.to_json()}, indent=2) + "\n"
        atomic_write(self._directory / "evaluation.json", content)

    def close(self) -> None:
        """Flush TensorBoard's events, which are written in the background."""
        self._metrics.close()


def step_values(metrics: StepMetrics, run: Run, step: int, tokens_per_second: float, mfu: float) -> dict[str, Any]:
    """What metrics.jsonl and the progress line hold of a step (from 0)."""
    mtp = {} if metrics.mtp_loss is None else {"mtp_loss": metrics.mtp_loss}
    return {
        "loss": metrics.loss,
        **mtp,
        "balance_loss": metrics.balance_loss,
        "max_vio": metrics.max_vio,
        "grad_norm": metrics.grad_norm,
        "lr": hyperparameters(run, step).learning_rate,
        "tokens_per_second": tokens_per_second,
        "mfu": mfu,
        "skipped": int(metrics.skipped),
    }
