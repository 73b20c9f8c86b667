"""Seconds a GPU computes for a layer: products at their shares of the peak, passes at theirs of the bandwidth."""

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
    """Backward to the layer's inputs, what is made again included."""
    weights: float
    """Backward to the weights: what may wait."""

    @property
    def total(self) -> float:
        """A token's way forward and back."""
        return self.forward + self.inputs + self.weights


def layer_time(layer: Layer, layout: Layout, cluster: Cluster, assumed: Assumptions) -> LayerTime:
    """Time of `layer`; tensor parallel GPUs share it evenly."""
    gpu = cluster.gpu
    free = 1.0
    if layout.expert > cluster.per_node:
        free -= assumed.communication_multiprocessors / gpu.multiprocessors
    quantised = gpu.fp8 * assumed.gemm_fp8 if layout.precision == "fp8" and gpu.fp8 else gpu.bf16 * assumed.gemm_bf16
    uneven = assumed.imbalance if layer.routed and layout.expert > 1 else 1.0
    # Of a MoE layer's products the routed experts' wait for the busiest rank.
    weights = layer.weights + (uneven - 1) * layer.routed_weights
    product = 2 * (weights / quantised + layer.exact / (gpu.bf16 * assumed.gemm_bf16)) / free
    peak = gpu.bf16 * free
    forward = product + layer.scores / (peak * assumed.attention_forward)
    bandwidth = gpu.bandwidth * assumed.memory
    forward += layer.forward_bytes / bandwidth
    # Inputs cast and transposed for the weights' gradients go with those, about a third of the backward passes.
    inputs = product + layer.scores_backward / (peak * assumed.attention_backward)
    inputs += layer.backward_bytes * 2 / 3 / bandwidth + _again(layer, layout, forward, quantised * free)
    later = product + layer.backward_bytes / 3 / bandwidth
    shared = layout.tensor
    return LayerTime(forward / shared, inputs / shared, later / shared)


def _again(layer: Layer, layout: Layout, forward: float, rate: float) -> float:
    """What recomputation adds to the backward pass (the passes it makes again are counted in all modes)."""
    if layout.recompute == "full":
        return forward
    return 2 * layer.remade / rate if layout.recompute == "selective" else 0.0
