"""How long a step of a run takes on this machine, by running some."""

import time
from pathlib import Path
from statistics import median

from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.run import Run
from fathom.train.setup import build_state, open_rows, tokenize_once


def seconds_per_step(run: Run, directory: Path, ranks: Ranks, steps: int, seconds: float) -> float:
    """Median time of a step of a resolved run, from the second half of real ones on weights then discarded.

    There are `steps` of them, or as many as begin within `seconds`, but two at least.
    """
    corpus = tokenize_once(run, directory / "data", ranks)
    state = build_state(run, ranks)
    rows = open_rows(corpus, run, "train")
    times = []
    end = time.perf_counter() + seconds
    for step in range(steps):
        if ranks.any(step >= 2 and time.perf_counter() > end):
            break
        began = time.perf_counter()
        batches = micro_batches(rows, step * run.train.batch_size, run.train.batch_size, run, ranks)
        pretrain_step(state, batches, run.train.batch_size, run, ranks)
        times.append(time.perf_counter() - began)
    return median(times[len(times) // 2 :])
