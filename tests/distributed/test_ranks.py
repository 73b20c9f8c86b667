"""Two ranks with gloo do exactly what one does with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom.checkpoint.training_state import checkpoints
from fathom.metrics import read_metrics

pytestmark = pytest.mark.distributed


def _train(ranks: int, flags: list[str], out: Path) -> dict[str, torch.Tensor]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "fathom", "train", *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return load_file(checkpoints(out)[-1] / "model.safetensors")


def test_two_ranks_equal_one(tiny_flags: list[str], tmp_path: Path) -> None:
    # AdamW: Muon's bfloat16 orthogonalisation would enlarge the rounding of a sum in another order.
    flags = [*tiny_flags, "--optimizer.name", "adamw", "--train.steps", "5", "--train.micro-batch-size", "2"]
    one, two = _train(1, flags, tmp_path / "one"), _train(2, flags, tmp_path / "two")
    for name, tensor in one.items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(tensor, two[name]), name
        else:
            torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5, msg=name)
    rows = [[r for r in read_metrics(tmp_path / n / "metrics.jsonl") if "loss" in r] for n in ("one", "two")]
    assert len(rows[0]) == 5
    for a, b in zip(*rows, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "max_vio"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key
