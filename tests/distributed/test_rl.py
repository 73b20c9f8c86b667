"""Reinforcement learning on two ranks, each answering other problems, is that on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom.metrics import read_metrics
from tests.posttrain.talking_model import save_talking_model

pytestmark = pytest.mark.distributed


def _train(ranks: int, model: Path, out: Path) -> dict[str, torch.Tensor]:
    flags = "--task count_letters --problems 4 --group-size 4 --max-tokens 10 --overlong penalise --overlong-cushion 9"
    rest = f"--train.steps 2 --train.max-length 256 --train.compute-dtype float32 --eval-problems 3 --out {out}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, *f"-m fathom rl {model} {flags} {rest}".split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return load_file(out / "model" / "model.safetensors")


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    model = save_talking_model(tmp_path / "start")
    one, two = _train(1, model, tmp_path / "one"), _train(2, model, tmp_path / "two")
    start = load_file(model / "model.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in one.items())
    for name, tensor in one.items():
        # AdamW's first steps are the gradient's sign: where it is nearly 0, rounding decides; the rate is 3e-6.
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1.3e-5, msg=name)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    timed = {"rollout_tokens_per_second", "update_tokens_per_second"}
    assert len(rows[0]) == len(rows[1]) == 3
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - timed:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
