"""The plan of a model on a cluster in a layout: memory, communication, step time, cost of a budget of tokens."""

from dataclasses import dataclass

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.communication import (
    Traffic,
    dispatch_and_combine,
    gradient_traffic,
    stage_traffic,
    tensor_traffic,
)
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.memory import Memory, parameters_held, training_memory
from fathom.lab.planner.placement import Rank, ranks
from fathom.lab.planner.schedule import Chunks, bubble, busy
from fathom.model.config import ModelConfig

_OPTIMIZER_BYTES = {"fp32": 28, "bf16": 20}
"""Read and written per parameter by AdamW: master weight, gradient, two moments read; all but the gradient written."""


@dataclass(frozen=True)
class Communication:
    """Traffic sent in a step by a GPU of the busiest rank, by kind."""

    dispatch: Traffic
    combine: Traffic
    pipeline: Traffic
    tensor: Traffic
    gradients: Traffic
    """Reduction of gradients and all-gather of weights among data parallel ranks."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; they add up to `total`."""

    computing: float
    """Of the slowest pipeline rank; hidden all-to-all is within it."""
    exposed: float
    """All-to-all and other communication that is not hidden."""
    bubble: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    config: ModelConfig
    layout: Layout
    cluster: Cluster
    assumed: Assumptions
    memory: Memory
    communication: Communication
    chunks: Chunks
    time: StepTime

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.layout.global_batch * self.layout.length

    @property
    def flops(self) -> int:
        """Model FLOPs of a step, MTP modules included."""
        return self.tokens * self.config.flops_per_token(self.layout.length, mtp=True)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.time.total * (1 - self.assumed.lost)

    def mfu(self, mtp: bool = True) -> float:
        """Model FLOPs over the bfloat16 peak, whatever the precision, as reports do."""
        flops = self.config.flops_per_token(self.layout.length, mtp=mtp)
        return self.tokens_per_second * flops / (self.cluster.gpus * self.cluster.gpu.bf16)

    def gpu_hours(self, tokens: float) -> float:
        """GPU-hours to train on `tokens` tokens."""
        return tokens / self.tokens_per_second * self.cluster.gpus / 3600

    @property
    def fits(self) -> bool:
        """Whether the fullest GPU's part fits into its memory."""
        return self.memory.total <= self.cluster.gpu.memory


def make_plan(config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions) -> Plan:
    """Raises ConfigError for a layout that is impossible here; whether its memory suffices is `Plan.fits`."""
    layout.check(config, cluster)
    everyone = ranks(config, layout, cluster, assumed)
    micro_batches = layout.micro_batches(cluster)
    # All ranks wait for the one whose chunks take longest.
    paced = [(_chunks(config, layout, cluster, assumed, rank), rank) for rank in everyone]
    chunks, busiest = max(paced, key=lambda pace: _pace(layout, pace[0]))
    communication = _communication(config, layout, cluster, everyone)
    gradients = communication.gradients.seconds(cluster, assumed) * (1 - assumed.gradient_overlap)
    alone = layout.micro_batch * layout.length * busiest.seconds
    working = busy(layout, chunks, micro_batches)
    time = StepTime(
        computing=micro_batches * alone,
        exposed=max(0.0, working - micro_batches * alone),
        bubble=bubble(layout, chunks),
        gradients=gradients,
        optimizer=_optimizer(layout, cluster, assumed, everyone),
    )
    memory = training_memory(config, layout, cluster, assumed, everyone)
    return Plan(config, layout, cluster, assumed, memory, communication, chunks, time)


def _pace(layout: Layout, chunks: Chunks) -> float:
    """Seconds of a micro-batch in the middle of a step."""
    return chunks.pair if layout.schedule == "dualpipe" else chunks.forward + chunks.backward


def _chunks(config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions, rank: Rank) -> Chunks:
    """A rank's chunks of a micro-batch, communication that is not hidden included."""
    tokens = layout.micro_batch * layout.length * rank.share
    forward = tokens * sum(time.forward for time in rank.times)
    weights = tokens * sum(time.weights for time in rank.times)
    backward = tokens * sum(time.inputs for time in rank.times) + weights
    out, back = dispatch_and_combine(config, layout, cluster)
    each = out.seconds(cluster, assumed) + back.seconds(cluster, assumed)
    experts = tokens * rank.routed * each / layout.tensor
    blocks = sum(layer.name in ("moe", "dense") for layer in rank.layers)
    tensor = tokens * blocks * tensor_traffic(config, layout).seconds(cluster, assumed)
    states = stage_traffic(config, layout, cluster).seconds(cluster, assumed)
    visible = experts * (1 - assumed.overlap_alone) + tensor + (0.0 if layout.schedule == "dualpipe" else states)
    computed = forward + backward
    # Overlapped communication takes no time while computing takes longer; the rest is added.
    hidden = 2 * experts * assumed.overlap
    pair = max(computed, hidden) + 2 * experts * (1 - assumed.overlap) + 2 * tensor
    return Chunks(forward + visible, backward + visible, weights, pair)


def _communication(config: ModelConfig, layout: Layout, cluster: Cluster, everyone: list[Rank]) -> Communication:
    """By kind, of the rank that sends most."""
    rank = max(everyone, key=lambda each: each.routed)
    micro_batches = layout.micro_batches(cluster)
    tokens = micro_batches * layout.micro_batch * layout.length * rank.share
    out, back = dispatch_and_combine(config, layout, cluster)
    # Once forward and once backward through every layer.
    passes = 2 * tokens * rank.routed / layout.tensor
    blocks = sum(layer.name in ("moe", "dense") for layer in rank.layers)
    held = [parameters_held(each, layout) for each in everyone]
    most = max((gradient_traffic(*each, layout, cluster) for each in held), key=lambda t: t.network + t.link)
    return Communication(
        dispatch=out.times(passes),
        combine=back.times(passes),
        pipeline=stage_traffic(config, layout, cluster).times(2 * micro_batches * layout.chunks),
        tensor=tensor_traffic(config, layout).times(2 * tokens * blocks),
        gradients=most,
    )


def _optimizer(layout: Layout, cluster: Cluster, assumed: Assumptions, everyone: list[Rank]) -> float:
    """AdamW's pass over the master weights, sharded under ZeRO."""
    data = layout.data(cluster)
    copies = (data, data * layout.tensor // layout.expert) if layout.zero else (1, 1)
    held = (parameters_held(rank, layout) for rank in everyone)
    parameters = max(shared / copies[0] + experts / copies[1] for shared, experts in held)
    return _OPTIMIZER_BYTES[layout.moments] * parameters / (cluster.gpu.bandwidth * assumed.memory)
