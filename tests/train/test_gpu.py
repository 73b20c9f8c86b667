"""What only a GPU can show: the host waits for it once a step, and it trains as the CPU does."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.run import Run
from fathom.train.setup import build_state, open_rows, resolve, tokenize_once
from fathom.train.step import StepMetrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def _steps(run: Run, directory: Path, device: torch.device, steps: int) -> tuple[list[StepMetrics], list[str]]:
    """The steps' metrics, and where the host waited for the GPU in the last one."""
    ranks = Ranks(0, 1, device)
    prepared = tokenize_once(run, directory, ranks)
    run = resolve(run, prepared, ranks)
    state, rows, metrics = build_state(run, ranks), open_rows(prepared, run, "train"), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            if step + 1 == steps and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            metrics.append(pretrain_step(state, micro_batches(rows, 8 * step, 8, run, ranks), 8, run, ranks))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return metrics, [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_host_waits_once_a_step(kind: str, tiny_run: Run, tmp_path: Path) -> None:
    train, optimizer = replace(tiny_run.train, compute_dtype="bfloat16"), replace(tiny_run.optimizer, name=kind)
    _, waits = _steps(replace(tiny_run, train=train, optimizer=optimizer), tmp_path, torch.device("cuda", 0), 3)
    assert len(waits) == 1 and "loop.py" in waits[0], waits


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_it_trains_as_the_cpu_does(compute: str, tiny_run: Run, tmp_path: Path) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, compute_dtype=compute))
    found, expected = (_steps(run, tmp_path, torch.device(kind), 4)[0] for kind in ("cuda", "cpu"))
    for mine, cpu in zip(found, expected, strict=True):
        assert mine.loss == pytest.approx(cpu.loss, rel=1e-4 if compute == "float32" else 1e-2)
        assert mine.grad_norm == pytest.approx(cpu.grad_norm, rel=1e-3 if compute == "float32" else 5e-2)
