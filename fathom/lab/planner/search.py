"""Exhaustive search for the fastest layout that fits into memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

from fathom.config import ConfigError
from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout, Recompute
from fathom.lab.planner.plan import Plan, make_plan
from fathom.model.config import ModelConfig

_MICRO_BATCHES = (1, 2, 4, 8)
_CHUNKS = 2


def candidates(config: ModelConfig, given: Layout, cluster: Cluster) -> Iterator[Layout]:
    """Every valid layout of the same batch, length, precision, moments and ZeRO stage as the given one."""
    for pipeline in _divisors(cluster.gpus):
        for tensor in _divisors(cluster.per_node):
            if cluster.gpus % (pipeline * tensor):
                continue
            for expert in _divisors(config.n_routed_experts):
                base = replace(given, pipeline=pipeline, tensor=tensor, expert=expert, schedule="1f1b", chunks=1)
                yield from (layout for layout in _variants(base) if _valid(layout, config, cluster))


def _variants(base: Layout) -> Iterator[Layout]:
    """Schedules, micro-batches and recomputation around one split of the GPUs."""
    schedules = [("1f1b", 1)]
    if base.pipeline > 1:
        schedules += [("interleaved", _CHUNKS), ("zb1p", 1)]
        schedules += [("dualpipe", 1)] if base.pipeline % 2 == 0 else []
    for schedule, chunks in schedules:
        for micro_batch in _MICRO_BATCHES:
            for recompute in get_args(Recompute):
                choice = {"schedule": schedule, "chunks": chunks, "micro_batch": micro_batch, "recompute": recompute}
                yield replace(base, **choice)


def _valid(layout: Layout, config: ModelConfig, cluster: Cluster) -> bool:
    try:
        layout.check(config, cluster)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def search(config: ModelConfig, given: Layout, cluster: Cluster, assumed: Assumptions) -> Plan:
    """The fastest plan that fits; of equally fast ones the one with the most free memory.

    Raises ConfigError when nothing fits, with the closest miss.
    """
    best = closest = None
    for layout in candidates(config, given, cluster):
        plan = make_plan(config, layout, cluster, assumed)
        if plan.fits and (best is None or _cost(plan) < _cost(best)):
            best = plan
        if closest is None or plan.memory.total < closest.memory.total:
            closest = plan
    if best is not None:
        return best
    if closest is None:
        raise ConfigError(
            f"global_batch is {given.global_batch}; no layout of {cluster.gpus} GPUs divides it into micro-batches of "
            f"{' or '.join(map(str, _MICRO_BATCHES))}"
        )
    raise ConfigError(
        f"gpus is {cluster.gpus}; no layout fits: the smallest needs {closest.memory.total / 1e9:.1f} GB on a GPU of "
        f"{cluster.gpu.memory / 1e9:.0f} GB (pipeline {closest.layout.pipeline}, tensor {closest.layout.tensor}, "
        f"expert {closest.layout.expert}); take more GPUs, or zero 2 or 3"
    )


def _cost(plan: Plan) -> tuple[float, float]:
    return plan.time.total, plan.memory.total
