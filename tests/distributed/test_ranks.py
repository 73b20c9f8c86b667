"""Two ranks with gloo do what one does with the same global batch; barriers wait for the main rank and name others."""

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


def test_all_ranks_resume_from_the_newest_whole_checkpoint(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = [*tiny_flags, "--train.steps", "6", "--train.micro-batch-size", "2"]
    # Copies: tensors are mapped into the file, which is about to be damaged.
    whole = {name: tensor.clone() for name, tensor in _train(2, flags, tmp_path / "run").items()}
    damaged = tmp_path / "run" / "checkpoints" / "step-000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    resumed = _train(2, [*flags, "--resume"], tmp_path / "run")
    assert damaged.parent.with_name("step-000006.damaged").is_dir()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


BARRIER = r"""
import sys
import time
from datetime import timedelta
import fathom.distributed.ranks as module

late = int(sys.argv[1])
module._OTHERS_TIMEOUT = timedelta(seconds=1)
with module.data_parallel() as ranks:
    assert ranks.gather(ranks.rank * 10) == [0, 10]
    if ranks.rank == late:
        time.sleep(3)
    try:
        ranks.barrier()
        # One write a line: both ranks write to one pipe, and print() would write the end of the line apart.
        sys.stdout.write(f"rank {ranks.rank} passed\n")
        sys.stdout.flush()
    except RuntimeError as error:
        print(f"rank {ranks.rank}: {error}", flush=True)
        time.sleep(5 if ranks.is_main else 0)
"""


def _barrier(late: int, directory: Path) -> str:
    (directory / "barrier.py").write_text(BARRIER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(directory / "barrier.py"), str(late)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120).stdout


def test_a_barrier_waits_for_the_main_rank_and_names_another_that_hangs(tmp_path: Path) -> None:
    """The main rank may write for long; the others have no reason to be late."""
    assert sorted(_barrier(0, tmp_path).splitlines()) == ["rank 0 passed", "rank 1 passed"]
    assert "Ranks 1 failed to pass monitoredBarrier in 1000 ms" in _barrier(1, tmp_path)
