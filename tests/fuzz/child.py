"""Processes that can be killed: forked from one that has imported everything and computed nothing."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it, which takes longer than the runs here

from fathom.distributed.ranks import Ranks
from fathom.train.pretrain import train
from fathom.train.run import Run

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A child that calls the function; its exit code is 1 where that raises."""
    process = _CONTEXT.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def train_until(run: Run, directory: Path, resume: bool, log: Path, change: int | None = None) -> None:
    """Train, or be killed right before the change of number `change` to the file system."""
    with log.open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    changes = 0

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if opened or event in _CHANGES:
            changes += 1
            if changes == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)
    try:
        train(run, directory, Ranks(0, 1, torch.device("cpu")), resume)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (log.parent / "changes").write_text(str(changes))
