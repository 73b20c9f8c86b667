"""How long a step of a run takes on this machine, by running some."""

import time
from pathlib import Path
from statistics import median

from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.run import Run
from fathom.train.setup import build_state, open_rows, tokenize_once


def seconds_per_step(run: Run, directory: Path, ranks: Ranks, steps: int) -> float:
    """Median time of a step of a resolved run, from the second half of `steps` real ones on weights then discarded."""
    corpus = tokenize_once(run, directory / "data", ranks)
    state = build_state(run, ranks)
    rows = open_rows(corpus, run, "train")
    times = []
    for step in range(steps):
        began = time.perf_counter()
        batches = micro_batches(rows, step * run.train.batch_size, run.train.batch_size, run, ranks)
        pretrain_step(state, batches, run.train.batch_size, run, ranks)
        times.append(time.perf_counter() - began)
    return median(times[steps // 2 :])
