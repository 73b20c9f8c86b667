"""Two processes that split the runs of an ablation get the results of one, and make every run once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

CORPUS = Path(__file__).parents[2] / "fathom" / "lab"

PROGRAM = """
import os
import sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
import fathom.lab.ablations.command as command
from fathom.lab.ablations.scales import ALL, MINUTES
from fathom.lab.ablations.trial import run_trial

made = []

def counted(variant, data):
    made.append(str(variant.run.train.seed))
    return run_trial(variant, data)

if __name__ == "__main__":
    out, corpus = map(Path, sys.argv[1:3])
    ALL["minutes"] = replace(
        MINUTES, steps=3, batch=2, micro_batch=2, length=32, vocabulary=320, held_out_rows=4, seeds=2
    )
    command.run_trial = counted
    command.run_ablations(command.AblationsCommand(("routing",), out=out, corpus=str(corpus), jobs=1))
    (out / f"made-{os.environ['RANK']}.txt").write_text(" ".join(made))
"""


def _launch(processes: int, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script, out = tmp_path / "ablation.py", tmp_path / str(processes)
    script.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, str(script), str(out), str(CORPUS)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def _results(out: Path) -> Any:
    """The results without timings."""
    summary = json.loads((out / "ablations" / "minutes" / "routing.json").read_text())
    for row in summary["rows"]:
        del row["metrics"]["seconds_per_step"]
    return {name: value for name, value in summary.items() if name not in ("busy", "train_seconds")}


def test_two_processes_split_the_runs(tmp_path: Path) -> None:
    for processes in (1, 2):
        done = _launch(processes, tmp_path)
        assert done.returncode == 0, done.stderr
    assert _results(tmp_path / "2") == _results(tmp_path / "1")
    shares = [(tmp_path / "2" / f"made-{rank}.txt").read_text().split() for rank in (0, 1)]
    records = list((tmp_path / "2" / "runs").glob("*.json"))
    assert len(records) == sum(map(len, shares)) and abs(len(shares[0]) - len(shares[1])) <= 1
    assert done.stdout.count("page  ") == 1  # one process prints


def test_parallel_jobs_under_torchrun_are_refused() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launcher, "-m", "fathom", "ablations", "routing", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "--jobs is 2; under torchrun it must be 1" in " ".join(done.stderr.split())
