"""Traffic between GPUs: tokens to experts and back, hidden states along the pipeline, gradients and weights.

A token crosses the network once to each node where it has an expert, and is forwarded by NVLink to the GPUs there
(report, section 3.2.2). Routing is assumed to be uniform within its limit on groups.
"""

from dataclasses import dataclass
from math import comb

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout
from fathom.model.config import ModelConfig

_SCALE = 4 / 128
"""Bytes per FP8 element of its tile's float32 scale."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends."""

    network: float
    """To other nodes."""
    link: float
    """Within its node."""

    def seconds(self, cluster: Cluster, assumed: Assumptions) -> float:
        """Both run at once; the slower one decides."""
        gpu = cluster.gpu
        return max(self.network / (gpu.network * assumed.network), self.link / (gpu.link * assumed.link))

    def times(self, factor: float) -> "Traffic":
        """Scaled by `factor`."""
        return Traffic(self.network * factor, self.link * factor)

    def plus(self, other: "Traffic") -> "Traffic":
        """The sum."""
        return Traffic(self.network + other.network, self.link + other.link)


def blocks_touched(config: ModelConfig, blocks: int) -> float:
    """Expected number of `blocks` equal blocks of neighbouring experts in which a token has at least one.

    Groups are chosen uniformly, then experts uniformly within the chosen groups.
    """
    experts, groups, topk_group = config.n_routed_experts, config.n_group, config.topk_group
    size, reachable = experts // groups, topk_group * (experts // groups)
    choices = config.num_experts_per_tok
    if blocks >= groups and blocks % groups == 0:
        inside = topk_group / groups * _hit(reachable, experts // blocks, choices)
    elif groups % blocks == 0:
        whole = groups // blocks
        most = min(whole, topk_group)
        ways = comb(groups, topk_group)
        inside = sum(
            comb(whole, j) * comb(groups - whole, topk_group - j) / ways * _hit(reachable, j * size, choices)
            for j in range(1, most + 1)
        )
    else:  # blocks that cut across groups: as if there were no groups
        inside = _hit(experts, experts // blocks, choices)
    return blocks * inside


def _hit(reachable: int, inside: int, choices: int) -> float:
    """Chance that of `choices` distinct experts among `reachable` at least one is among `inside` of them."""
    return 1 - comb(reachable - inside, choices) / comb(reachable, choices)


def expert_traffic(config: ModelConfig, layout: Layout, cluster: Cluster, element_bytes: float) -> Traffic:
    """Bytes of a token's hidden state sent to (or returned from) one layer's experts, at `element_bytes` an element."""
    if layout.expert == 1:
        return Traffic(0.0, 0.0)
    state = config.hidden_size * element_bytes
    nodes = max(1, layout.expert // cluster.per_node)
    ranks = blocks_touched(config, layout.expert)
    if nodes == 1:
        return Traffic(0.0, ranks * (1 - 1 / layout.expert) * state)
    away = blocks_touched(config, nodes) * (1 - 1 / nodes)
    # A token arrives at the GPU of the same index in the node and takes NVLink from there.
    return Traffic(away * state, ranks * (1 - 1 / cluster.per_node) * state)


def dispatch_and_combine(config: ModelConfig, layout: Layout, cluster: Cluster) -> tuple[Traffic, Traffic]:
    """Per token and layer, forward: hidden states out (FP8 if the matmuls are), results back (bfloat16).

    The backward pass sends as much: gradients of the results out, gradients of the hidden states back.
    """
    out = 1 + _SCALE if layout.precision == "fp8" else 2.0
    return expert_traffic(config, layout, cluster, out), expert_traffic(config, layout, cluster, 2.0)


def stage_traffic(config: ModelConfig, layout: Layout, cluster: Cluster) -> Traffic:
    """Hidden states of one micro-batch from a stage to the next, or their gradients back, in bfloat16."""
    if layout.pipeline == 1:
        return Traffic(0.0, 0.0)
    size = 2.0 * layout.micro_batch * layout.length * config.hidden_size / layout.tensor
    within = layout.pipeline * layout.tensor <= cluster.per_node
    return Traffic(0.0, size) if within else Traffic(size, 0.0)


def tensor_traffic(config: ModelConfig, layout: Layout) -> Traffic:
    """One layer's forward (or backward) exchange among tensor parallel GPUs, per token of the micro-batch.

    Hidden states are all-gathered before and reduce-scattered after attention and feed-forward (sequence parallelism),
    in bfloat16.
    """
    others = (layout.tensor - 1) / layout.tensor
    return Traffic(0.0, 4 * 2.0 * config.hidden_size * others)


def gradient_traffic(shared: float, experts: float, layout: Layout, cluster: Cluster) -> Traffic:
    """One step's exchange of the gradients of a GPU's parameters, and of weights where ZeRO shards them."""
    data = layout.data(cluster)
    replicas = data * layout.tensor // layout.expert
    return _exchange(shared, data, layout, cluster).plus(_exchange(experts, replicas, layout, cluster))


def _exchange(parameters: float, ranks: int, layout: Layout, cluster: Cluster) -> Traffic:
    others = (ranks - 1) / ranks
    if layout.zero == 0:
        size = 2 * 4 * parameters * others  # all-reduce of gradients, float32
    elif layout.zero == 3:
        # Weights are all-gathered for every micro-batch, forward and backward.
        size = (4 + 2 * 2 * layout.micro_batches(cluster)) * parameters * others
    else:
        size = (
            (4 + 2) * parameters * others
        )  # reduce-scatter of gradients in float32, all-gather of weights in bfloat16
    return Traffic(0.0, size) if cluster.gpus <= cluster.per_node else Traffic(size, 0.0)
