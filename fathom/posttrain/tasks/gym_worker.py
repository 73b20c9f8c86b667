"""Makes and judges the problems of reasoning-gym, in a process that `gym.py` starts.

Why a process: some data sets draw from Python's and NumPy's global generators or from the order of sets, which here
hold still; some verifiers evaluate what they are given, search without end, or print. The kernel ends the process where
a request takes too much time or memory.

Each line of standard input is a request, each line of standard output its answer; null is that the package raised. This
file imports the package, NumPy and the standard library alone.
"""

import contextlib
import functools
import json
import os
import random
import resource
import signal
import sys
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS

_SECONDS = 10.0
"""Processor time of one request; most take milliseconds, the first ones read files."""
_MEMORY = 4 << 30
"""Bytes that the process may allocate."""
_BLOCK = 500
"""Problems of one of the package's data sets, its own default; some draw all of them at once."""


@functools.lru_cache(maxsize=4)
def _block(name: str, first: int) -> Any:
    _seed(first)
    return reasoning_gym.create_dataset(name, seed=first, size=_BLOCK)


@functools.lru_cache(maxsize=4096)
def _entry(name: str, index: int) -> dict[str, Any]:
    block, place = divmod(index, _BLOCK)
    dataset = _block(name, block * _BLOCK)
    _seed(index)
    return dataset[place]


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value % 2**32)


def _answer(request: dict[str, Any]) -> Any:
    if "names" in request:
        return sorted(set(DATASETS) - {"composite"})  # which is a mixture of the others
    name = request["dataset"]
    if "problem" in request:
        entry = _entry(name, request["problem"])
        return {"question": entry["question"], "answer": entry["answer"]}
    index = request["score"]
    return float(_block(name, index // _BLOCK * _BLOCK).score_answer(request["answer"], _entry(name, index)))


def main() -> None:
    for limit, value in ((resource.RLIMIT_AS, _MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit memory; time it does
            resource.setrlimit(limit, (value, value))
    # Ends the process, whatever it is doing and whatever its parent does with the signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the verifiers that print
    os.dup2(1, 2)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            answer = json.dumps(_answer(json.loads(line)))
        except Exception:  # of whatever kind the package raises
            answer = "null"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, file=channel, flush=True)


if __name__ == "__main__":
    main()
