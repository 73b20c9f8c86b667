"""Fine-tuning on two ranks, each with other samples of a step, is fine-tuning on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.metrics import read_metrics
from tests.posttrain.chats import save_small_model, write_chats


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    model, chats = save_small_model(tmp_path / "model"), write_chats(tmp_path / "chats.jsonl")
    flags = [
        *("--data", str(chats), "--data.heldout", "0.1", "--train.steps", "5", "--train.batch-samples", "7"),
        *("--train.compute-dtype", "float32", "--train.max-length", "128", "--optimizer.learning-rate", "1e-3"),
        *("--train.seq-balance-loss-weight", "0.01", "--train.bias-update-speed", "0.01"),
    ]
    launchers = {"one": [], "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]}
    for name, launcher in launchers.items():
        command = [sys.executable, *launcher, "-m", "fathom", "sft", str(model), "--out", str(tmp_path / name), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in launchers)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in launchers]
    for key in ("loss", "mtp_loss", "val_loss", "trained_tokens", "max_vio"):
        values = [[row[key] for row in each if key in row] for each in rows]
        assert values[0] and values[1] == pytest.approx(values[0], rel=1e-4), key
