"""How long a step of a run takes on this machine, by running some."""

import time
from pathlib import Path
from statistics import median

from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.run import Run
from fathom.train.setup import build_state, prepare_data, rows_of


def seconds_per_step(run: Run, directory: Path, ranks: Ranks, steps: int) -> float:
    """Median time of a step of a resolved run, from the second half of `steps` real ones on weights then discarded."""
    prepared = prepare_data(run, directory / "data", ranks)
    state = build_state(run, ranks)
    rows = rows_of(prepared, run, "train")
    times = []
    for step in range(steps):
        began = time.perf_counter()
        batches = micro_batches(rows, step * run.train.batch_size, run.train.batch_size, run, ranks)
        pretrain_step(state, batches, run.train.batch_size, run, ranks)
        times.append(time.perf_counter() - began)
    return median(times[steps // 2 :])
