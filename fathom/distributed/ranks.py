"""Data parallelism: every rank holds the model and computes a part of each batch, as `torchrun` starts them.

One process without torchrun is simply rank 0 of 1: the loops are written once, against `Ranks`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")

_MAIN_RANK_TIMEOUT = timedelta(hours=24)
"""How long the others wait at a barrier for the main rank, which alone tokenises and writes."""
_OTHERS_TIMEOUT = timedelta(minutes=10)
"""How long the main rank waits for the others, which do nothing long by themselves."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among all of them, and the collectives that the loops need."""

    rank: int
    world: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None
    """All ranks over gloo, for what is on the host and for waiting; None: the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank; for small values on the host."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.host_group)
        return found

    def barrier(self) -> None:
        """Wait until every rank has arrived, however long the main rank tokenises a corpus or writes a checkpoint.

        NCCL's own barrier is a kernel that its watchdog aborts, with the run, once it has waited ten minutes. This one
        waits on the host. It is bounded: a rank that died closes its connection, which ends the wait at once; one that
        hangs is named after the timeout.
        """
        if self.world > 1:
            dist.monitored_barrier(self.host_group, timeout=_OTHERS_TIMEOUT, wait_all_ranks=True)

    def broadcast(self, value: str) -> str:
        """Rank 0's text, on every rank."""
        return self.gather(value)[0]

    def replicate(self, module: nn.Module) -> nn.Module:
        """Average gradients over all ranks during the backward pass.

        Buffers are left alone: the correction biases are updated alike on every rank from the summed loads.
        """
        if self.world == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


SINGLE_PROCESS = Ranks(0, 1, torch.device("cpu"))


@contextmanager
def data_parallel() -> Iterator[Ranks]:
    """Join the processes that torchrun started (gloo on CPU, nccl on GPUs), and leave them at the end."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    host_group = dist.new_group(backend="gloo", timeout=_MAIN_RANK_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), world, device, host_group)
    finally:
        dist.destroy_process_group()


@contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of all micro-batches but the last stay local: they travel once per step."""
    if isinstance(module, DistributedDataParallel) and not last:
        with module.no_sync():
            yield
    else:
        yield
