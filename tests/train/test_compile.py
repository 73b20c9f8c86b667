"""Compiled layers train like eager ones: same losses, in the run's own loop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.runtime.hardware import compile_unavailable_reason
from fathom.train.pretrain import train
from fathom.train.run import Run

_LACKING = compile_unavailable_reason(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(_LACKING is not None, reason=f"torch.compile cannot run here: {_LACKING}")
def test_compiled_and_eager_runs_agree(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    losses = []
    model = replace(tiny_run.model, num_hidden_layers=2)  # a layer of each kind
    for choice in ("off", "on"):
        settings = replace(tiny_run.train, steps=3, save_every=0, compile=choice)
        train(replace(tiny_run, model=model, train=settings), tmp_path / choice, one_rank)
        rows = read_metrics(tmp_path / choice / "metrics.jsonl")
        losses.append([(row["loss"], row["mtp_loss"]) for row in rows if "loss" in row])
    assert len(losses[1]) == 3
    for eager, compiled in zip(*losses, strict=True):
        assert compiled == pytest.approx(eager, rel=2e-5)
