"""Bytes on each GPU: weights, gradients, optimizer state and activations in training; weights and cache in serving.

Weights are bfloat16 (cast to FP8 as needed), gradients float32; float32 master weights belong to the optimizer. ZeRO
shards over the ranks that hold the same parameters.
"""

from dataclasses import dataclass, replace

from fathom.checkpoint.info import cache_bytes, weight_bytes
from fathom.lab.planner.assumptions import Assumptions
from fathom.lab.planner.hardware import Cluster
from fathom.lab.planner.layout import Layout
from fathom.lab.planner.placement import Rank
from fathom.lab.planner.schedule import in_flight
from fathom.lab.planner.work import kept_bytes
from fathom.model.config import ModelConfig

_LOGITS_CHUNK = 1024
"""Tokens whose logits exist at once, as in fathom/ops/loss."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by part; they add up to `total`."""

    weights: float
    gradients: float
    optimizer: float
    """float32 master weights and two moments."""
    activations: float
    """Saved for the backward pass."""
    logits: float
    """A chunk of logits, in bfloat16 and float32."""
    reserved: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Serving:
    """Bytes over all GPUs to serve the model."""

    weights: int
    cache_per_token: int
    cache: int
    gpus: int
    """The fewest GPUs that hold this in 90 % of their memory."""


def parameters_held(rank: Rank, layout: Layout) -> tuple[float, float]:
    """(shared, routed experts') parameters on one GPU of the rank."""
    shared = sum(layer.shared_parameters for layer in rank.layers) / layout.tensor
    return shared, sum(layer.expert_parameters for layer in rank.layers) / layout.expert


def training_memory(
    config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions, everyone: list[Rank]
) -> Memory:
    """Memory of the fullest pipeline rank."""
    candidates = [_rank_memory(config, layout, cluster, assumed, rank) for rank in everyone]
    return max(candidates, key=lambda memory: memory.total)


def _rank_memory(config: ModelConfig, layout: Layout, cluster: Cluster, assumed: Assumptions, rank: Rank) -> Memory:
    data = layout.data(cluster)
    replicas = (data, data * layout.tensor // layout.expert)  # of shared parameters, of experts

    def held(bytes_: float, from_stage: int) -> float:
        parts = zip(parameters_held(rank, layout), replicas, strict=True)
        return sum(bytes_ * parameters / (count if layout.zero >= from_stage else 1) for parameters, count in parts)

    tokens = layout.micro_batch * layout.length
    has_head = any("head" in layer.name for layer in rank.layers)
    logits = min(tokens, _LOGITS_CHUNK) * config.vocab_size * (2 + 4) / layout.tensor if has_head else 0.0
    return Memory(
        weights=held(2, from_stage=3),
        gradients=held(4, from_stage=2),
        optimizer=held(4 + 2 * (2 if layout.moments == "bf16" else 4), from_stage=1),
        activations=_activations(config, layout, rank, tokens),
        logits=logits,
        reserved=assumed.reserved,
    )


def _activations(config: ModelConfig, layout: Layout, rank: Rank, tokens: int) -> float:
    """Activations of the micro-batches in flight; under full recomputation also all of one layer's."""
    kept = sum(_layer_bytes(config, layout, layer.name) for layer in rank.layers) * rank.share
    activations = kept * in_flight(layout)
    if layout.recompute == "full":
        whole = replace(layout, recompute="none")
        activations += max((_layer_bytes(config, whole, layer.name) for layer in rank.layers), default=0)
    return activations * tokens / layout.tensor


def _layer_bytes(config: ModelConfig, layout: Layout, name: str) -> int:
    if name in ("moe", "dense"):
        return kept_bytes(config, layout, moe=name == "moe")
    # Embedding: the tokens. Heads: hidden states and gradients. MTP input: both norms' inputs and their concatenation.
    return {"embedding": 8, "mtp input": 8 * config.hidden_size}.get(name, 4 * config.hidden_size)


def serving_memory(config: ModelConfig, cluster: Cluster, precision: str, context: int, batch: int) -> Serving:
    """Weights (MTP modules included) and the latent cache in bfloat16 of `batch` requests of `context` tokens."""
    weights = weight_bytes(config)["fp8 blocks" if precision == "fp8" else "bf16"]
    assert weights is not None  # these two precisions always exist
    per_token = cache_bytes(config, mtp=True)
    cache = per_token * context * batch
    return Serving(weights, per_token, cache, -int(-(weights + cache) // (0.9 * cluster.gpu.memory)))
