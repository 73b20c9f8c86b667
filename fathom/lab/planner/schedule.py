"""Pipeline schedules: the duration of a step when every stage takes the same time for a chunk, and its bubble.

f and b are the seconds of a micro-batch's forward and whole backward chunk, w the part of b that computes weight
gradients, pair those of a forward and a backward chunk that DualPipe overlaps. Bubbles are those of the report
(section 3.2.1, table 2); tests/lab/planner/test_schedule.py runs the schedules event by event.
"""

from dataclasses import dataclass

from fathom.lab.planner.layout import Layout


@dataclass(frozen=True)
class Chunks:
    """Seconds of one stage's work on one micro-batch."""

    forward: float
    backward: float
    """Gradients of inputs and of weights."""
    weights: float
    """The part of backward that may be postponed."""
    pair: float
    """A forward and a backward chunk overlapped."""


def bubble(layout: Layout, chunks: Chunks) -> float:
    """Idle seconds of a GPU in a step."""
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
    """Busy seconds of a GPU in a step."""
    if layout.schedule != "dualpipe":
        return micro_batches * (chunks.forward + chunks.backward)
    paired = pairs(layout, micro_batches)
    return paired * chunks.pair + (micro_batches - paired) * (chunks.forward + chunks.backward)


def pairs(layout: Layout, micro_batches: int) -> int:
    """Forward chunks that DualPipe overlaps with a backward one on the first rank, which has the fewest."""
    return micro_batches - 3 * layout.pipeline // 2 + 1


def in_flight(layout: Layout) -> float:
    """Micro-batches whose activations the fullest rank holds at once, per stage (report, table 2)."""
    if layout.schedule == "dualpipe":
        return layout.pipeline + 1
    if layout.schedule == "interleaved":
        return layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.chunks))
    return layout.pipeline


def stages(costs: tuple[float, ...], count: int) -> list[range]:
    """Split the layers into `count` contiguous stages so that the most expensive stage costs the least."""
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
