"""Compute time of a layer on a GPU: matmuls at a fraction of peak FLOP/s, other passes at one of the bandwidth."""

from dataclasses import dataclass

from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.work import Layer


@dataclass(frozen=True)
class LayerTime:
    """Seconds per token of the micro-batch, on one of the layer's GPUs."""

    forward: float
    inputs: float
    """Backward to the layer's inputs, recomputation included."""
    weights: float
    """Backward to the weights, which a schedule may postpone."""

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.inputs + self.weights


def layer_time(layer: Layer, layout: Layout, cluster: Cluster, assumed: Assumptions) -> LayerTime:
    """Time of `layer`, divided evenly among tensor parallel GPUs."""
    gpu = cluster.gpu
    free = 1.0
    if layout.expert > cluster.per_node:
        free -= assumed.communication_multiprocessors / gpu.multiprocessors
    quantised = gpu.fp8 * assumed.gemm_fp8 if layout.precision == "fp8" and gpu.fp8 else gpu.bf16 * assumed.gemm_bf16
    uneven = assumed.imbalance if layer.routed and layout.expert > 1 else 1.0
    # The routed experts of a MoE layer wait for the busiest rank.
    weights = layer.weights + (uneven - 1) * layer.routed_weights
    matmul = 2 * (weights / quantised + layer.exact / (gpu.bf16 * assumed.gemm_bf16)) / free
    peak = gpu.bf16 * free
    forward = matmul + layer.scores / (peak * assumed.attention_forward)
    bandwidth = gpu.bandwidth * assumed.memory
    forward += layer.forward_bytes / bandwidth
    # Casting and transposing inputs for the weights' gradients belongs to those: about a third of the backward passes.
    inputs = matmul + layer.scores_backward / (peak * assumed.attention_backward)
    inputs += layer.backward_bytes * 2 / 3 / bandwidth + _recomputed(layer, layout, forward, quantised * free)
    later = matmul + layer.backward_bytes / 3 / bandwidth
    shared = layout.tensor
    return LayerTime(forward / shared, inputs / shared, later / shared)


def _recomputed(layer: Layer, layout: Layout, forward: float, rate: float) -> float:
    """Matmul time that recomputation adds to the backward pass (its memory passes are counted in all modes)."""
    if layout.recompute == "full":
        return forward
    return 2 * layer.remade / rate if layout.recompute == "selective" else 0.0
