"""Evaluation is a collective call: any number of ranks find, to the last bit, what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fathom.config import save_json
from fathom.distributed.ranks import Ranks
from fathom.train.run import Run
from fathom.train.setup import resolve, tokenize_once

pytestmark = pytest.mark.distributed

PROGRAM = """
import json
import sys
from pathlib import Path
from fathom.config import load_json
from fathom.data.tokenize import open_tokenized
from fathom.distributed.ranks import data_parallel
from fathom.train.evaluation import Validation
from fathom.train.run import Run
from fathom.train.setup import build_state

out = Path(sys.argv[1])
run = load_json(Run, out / "run.json")
with data_parallel() as ranks:
    state = build_state(run, ranks)
    validation = Validation(run, open_tokenized(out / "data"), ranks)
    results = [validation.evaluate(state.model, sequences).to_json() for sequences in (None, 7, 1)]
(out / f"{ranks.rank}-of-{ranks.world}.json").write_text(json.dumps(results))
"""


def _evaluate(processes: int, out: Path) -> list[Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, str(out / "evaluate.py"), str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"{rank}-of-{processes}.json").read_text()) for rank in range(processes)]


def test_the_result_depends_on_no_number_of_ranks(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    """A single row leaves some ranks without any; the whole split ends with a padded batch."""
    prepared = tokenize_once(tiny_run, tmp_path / "data", one_rank)
    save_json(resolve(tiny_run, prepared, one_rank), tmp_path / "run.json")
    (tmp_path / "evaluate.py").write_text(PROGRAM)
    (expected,) = _evaluate(1, tmp_path)
    length = tiny_run.train.sequence_length
    assert [result["tokens"] for result in expected] == [prepared.valid_tokens - 1, 7 * length, length]
    assert all(0 <= result["mtp_acceptance"] <= 1 < result["bits_per_byte"] for result in expected)
    for processes in (2, 3):
        assert _evaluate(processes, tmp_path) == [expected] * processes
