"""Runs that are interrupted, and what they leave."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fathom.checkpoint.hf.model import load_model
from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics


def assert_resumes_exactly(loop: Callable[..., bool], run: Any, out: Path, ranks: Ranks, lost: str) -> None:
    """A run that loses its checkpoint `lost`, as if killed before it, ends with the same weights and metrics."""
    assert loop(run, out, ranks)
    weights, metrics = load_model(out / "model").state_dict(), _metrics(out)
    shutil.rmtree(out / "checkpoints" / lost)
    assert loop(run, out, ranks, resume=True)
    again = load_model(out / "model").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert _metrics(out) == metrics


def _metrics(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in record.items() if not name.endswith("per_second")}
        for record in read_metrics(out / "metrics.jsonl")
    ]
