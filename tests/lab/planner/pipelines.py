"""A tiny discrete simulator of pipeline schedules: ranks take their operations in order, as soon as the inputs are
there. An oracle for fathom/lab/planner/schedule.py, which only knows formulas.

An operation is a tuple of parts done at once: ("F" | "B" | "I" | "W", direction, micro-batch, stage). B is a whole
backward chunk, I its first half (gradients of inputs), W the other half.
"""

from collections import Counter, deque

Part = tuple[str, int, int, int]
Operation = tuple[Part, ...]


def makespan(orders: list[list[Operation]], seconds: dict[str, float], stages: int) -> float:
    """End of the last operation. `seconds` of F, B, I, W and FB (a forward and a backward chunk together)."""
    done: dict[tuple[str, int, int, int], float] = {}
    free = [0.0] * len(orders)
    queues = [deque(order) for order in orders]
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            while queue and all(need in done for part in queue[0] for need in needs(part, stages)):
                operation = queue.popleft()
                ready = [done[need] for part in operation for need in needs(part, stages)]
                kind = "FB" if len(operation) == 2 else operation[0][0]
                free[rank] = max([free[rank], *ready]) + seconds[kind]
                for name, direction, micro, stage in operation:
                    done["B" if name == "I" else name, direction, micro, stage] = free[rank]
                moved = True
        assert moved, "the schedule waits for itself"
    return max(free)


def needs(part: Part, stages: int) -> list[Part]:
    """What must have ended before: stages are counted in the direction that the micro-batch travels."""
    name, direction, micro, stage = part
    if name == "F":
        return [("F", direction, micro, stage - 1)] if stage else []
    if name == "W":
        return [("B", direction, micro, stage)]
    before = [("F", direction, micro, stage)]
    return before + ([("B", direction, micro, stage + 1)] if stage + 1 < stages else [])


def one_forward_one_backward(ranks: int, micro_batches: int) -> list[list[Operation]]:
    """1F1B: rank r runs ahead by as many forward chunks as there are ranks after it."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        order = [(("F", 0, m, rank),) for m in range(ahead)]
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                order.append((("F", 0, ahead + m, rank),))
            order.append((("B", 0, m, rank),))
        orders.append(order)
    return orders


def interleaved(ranks: int, chunks: int, micro_batches: int) -> list[list[Operation]]:
    """Every rank holds `chunks` stages; micro-batches go round in groups of as many as there are ranks."""
    total = micro_batches * chunks

    def place(index: int, backward: bool) -> tuple[int, int]:
        group, within = divmod(index, ranks * chunks)
        chunk, offset = divmod(within, ranks)
        return group * ranks + offset, chunks - 1 - chunk if backward else chunk

    orders = []
    for rank in range(ranks):
        ahead = min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks)
        forward = [(("F", 0, m, c * ranks + rank),) for m, c in (place(i, False) for i in range(total))]
        backward = [(("B", 0, m, c * ranks + rank),) for m, c in (place(i, True) for i in range(total))]
        order = forward[:ahead]
        for i in range(total):
            order += forward[ahead + i : ahead + i + 1] + backward[i : i + 1]
        orders.append(order)
    return orders


def zero_bubble(ranks: int, micro_batches: int) -> list[list[Operation]]:
    """ZB1P: as 1F1B, but a rank postpones its weights' gradients: rank r does that of as many micro-batches late as
    there are ranks before it, so that inputs' gradients travel on at once."""
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        order = [(("F", 0, m, rank),) for m in range(ahead)]
        for m in range(micro_batches):
            if ahead + m < micro_batches:
                order.append((("F", 0, ahead + m, rank),))
            order.append((("I", 0, m, rank),))
            if m >= rank:
                order.append((("W", 0, m - rank, rank),))
        order += [(("W", 0, m, rank),) for m in range(max(0, micro_batches - rank), micro_batches)]
        orders.append(order)
    return orders


class DualPipe:
    """One rank's operations, in the eight steps of DeepSeek's published algorithm (github.com/deepseek-ai/DualPipe)."""

    def __init__(self, rank: int, ranks: int, micro_batches: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.second_half = rank >= ranks // 2
        self.order: list[Operation] = []
        self.counts: Counter[tuple[str, int]] = Counter()
        self.late: deque[Part] = deque()
        half, place = ranks // 2, min(rank, ranks - 1 - rank)
        outer, inner = half - place - 1, place + 1
        for _ in range(2 * outer):
            self.add("F", 0)
        for _ in range(inner):
            self.add("F", 0)
            self.add("F", 1)
        for _ in range(outer):
            self.add("I", 1)
            self.weight()
            self.add("F", 1)
        for i in range(micro_batches // 2 - ranks + place + 1):
            if i == 0 and place == half - 1:  # the middle ranks have nothing to pair yet
                self.add("F", 0)
                self.add("B", 1)
            else:
                self.pair(0, 1)
            self.pair(1, 0)
        for _ in range(outer):
            self.add("B", 1)
            self.pair(1, 0)
        postponed = False
        for i in range(inner):
            postponed = postponed or (i == inner // 2 and place % 2 == 1)
            self.add("I" if postponed else "B", 1)
            postponed = postponed or (i == inner // 2 and place % 2 == 0)
            self.add("I" if postponed else "B", 0)
        for _ in range(outer):
            self.weight()
            self.add("I", 0)
        while self.late:
            self.weight()

    def part(self, name: str, phase: int) -> Part:
        direction = phase ^ self.second_half
        kind = "F" if name == "F" else "B"
        micro = self.counts[kind, direction]
        self.counts[kind, direction] += 1
        stage = self.rank if direction == 0 else self.ranks - 1 - self.rank
        return name, direction, micro, stage

    def add(self, name: str, phase: int) -> None:
        part = self.part(name, phase)
        self.order.append((part,))
        if name == "I":
            self.late.append(part)

    def pair(self, forward: int, backward: int) -> None:
        self.order.append((self.part("F", forward), self.part("B", backward)))

    def weight(self) -> None:
        _, direction, micro, stage = self.late.popleft()
        self.order.append((("W", direction, micro, stage),))


def dualpipe(ranks: int, micro_batches: int) -> list[list[Operation]]:
    """Every rank's operations."""
    return [DualPipe(rank, ranks, micro_batches).order for rank in range(ranks)]
