"""Pipeline schedules: how long a step takes when every stage needs the same time for a chunk, and what waits idle.

f and b are the seconds of a micro-batch's forward and whole backward chunk, w the part of b that makes weight
gradients, pair those of a forward and a backward chunk that DualPipe runs as one. Bubbles are those of the report
(section 3.2.1, table 2); tests/lab/planner/test_schedule.py runs the schedules event by event.
"""

from dataclasses import dataclass

from fathom.lab.planner.layout import Layout


@dataclass(frozen=True)
class Chunks:
    """Seconds of one stage's work on one micro-batch."""

    forward: float
    backward: float
    """Both halves: inputs' and weights' gradients."""
    weights: float
    """Of the backward, what may be postponed."""
    pair: float
    """A forward and a backward chunk overlapped."""


def bubble(layout: Layout, chunks: Chunks) -> float:
    """Seconds a GPU waits in a step."""
    stages = layout.pipeline
    both = chunks.forward + chunks.backward
    if layout.schedule == "1f1b":
        return (stages - 1) * both
    if layout.schedule == "interleaved":
        return (stages - 1) * both / layout.chunks
    if layout.schedule == "zb1p":
        return (stages - 1) * max(0.0, both - 2 * chunks.weights)
    return (stages // 2 - 1) * max(0.0, chunks.pair + chunks.backward - 3 * chunks.weights)


def busy(layout: Layout, chunks: Chunks, micro_batches: int) -> float:
    """Seconds a GPU works in a step."""
    if layout.schedule != "dualpipe":
        return micro_batches * (chunks.forward + chunks.backward)
    paired = pairs(layout, micro_batches)
    return paired * chunks.pair + (micro_batches - paired) * (chunks.forward + chunks.backward)


def pairs(layout: Layout, micro_batches: int) -> int:
    """Forward chunks that DualPipe runs together with a backward one, on the first rank, which has the fewest."""
    return micro_batches - 3 * layout.pipeline // 2 + 1


def in_flight(layout: Layout) -> float:
    """Micro-batches' worth of a stage's activations that the worst rank holds at once (report, table 2)."""
    if layout.schedule == "dualpipe":
        return layout.pipeline + 1
    if layout.schedule == "interleaved":
        return layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks))
    return layout.pipeline


def stages(costs: tuple[float, ...], count: int) -> list[range]:
    """Cut layers into `count` runs of neighbours so that the dearest run is as cheap as can be."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    size = len(costs)
    best = [sums[end] for end in range(size + 1)]
    cuts = [[0] * (size + 1)]
    for _ in range(count - 1):
        following, cut = list(best), [0] * (size + 1)
        for end in range(size + 1):
            following[end], cut[end] = min((max(best[at], sums[end] - sums[at]), at) for at in range(end + 1))
        best = following
        cuts.append(cut)
    ends, end = [], size
    for cut in reversed(cuts):
        ends.append(range(cut[end], end))
        end = cut[end]
    return ends[::-1]
