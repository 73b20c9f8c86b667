"""What an ablation trains: a run's configuration, and replaced modules that a configuration cannot express.

Each parameter is initialised from (seed, name), so two variants start from the same values wherever they have a
parameter of the same name and shape. Costs are counted on the modules, by the same rule for every variant.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn

from fathom.lab.ablations.attention import GroupedQueryAttention
from fathom.lab.ablations.experts import NoSharedExperts
from fathom.lab.ablations.prediction import ApartModel
from fathom.model.block import Block
from fathom.model.config import ModelConfig
from fathom.model.layers import Linear
from fathom.model.mla import MultiHeadLatentAttention
from fathom.model.moe import Experts, MoE
from fathom.model.router import Router
from fathom.model.transformer import Model
from fathom.train.run import Run

Measure = Literal["cache", "denial", "groups", "drafting"]
"""Measurements beside bits per byte (fathom/lab/ablations/measure.py)."""


@dataclass(frozen=True)
class Variant:
    """One model to train and measure. Its JSON, seed included, identifies a finished run."""

    run: Run
    """The configuration; `train.seed` is replaced by each seed of the ablation."""
    kv_heads: int | None = None
    """Key/value heads of the grouped-query attention that replaces MLA; none: MLA."""
    shared_experts: bool = True
    """False: no shared experts, whatever `n_shared_experts` is."""
    shared_ends: bool = True
    """False: every MTP module has its own embedding and head."""
    measures: tuple[Measure, ...] = ()
    """Measurements beside bits per byte."""

    def with_seed(self, seed: int) -> "Variant":
        return replace(self, run=replace(self.run, train=replace(self.run.train, seed=seed)))


@dataclass(frozen=True)
class Costs:
    """The costs of a model, counted on its modules; MTP modules are counted separately."""

    parameters: int
    """Of the main model."""
    mtp_parameters: int
    """Of the MTP modules."""
    flops_per_token: int
    """Per training token, MTP modules included: 6 per active matrix weight, and causal attention's matmuls."""
    cache_elements: int
    """Cached per token over all layers of the main model."""


def build_model(variant: Variant) -> Model:
    """The variant's model, initialised from its seed."""
    model = _blank_model(variant)
    _initialize(model, variant.run.train.seed)
    return model


def _blank_model(variant: Variant) -> Model:
    """The model with its modules replaced, before initialisation."""
    config = variant.run.model
    model = Model(config) if variant.shared_ends else ApartModel(config)
    for block in cast(list[Block], [*model.layers, *model.mtp]):
        if variant.kv_heads is not None:
            block.register_module("self_attn", GroupedQueryAttention(config, variant.kv_heads))
        if not variant.shared_experts and isinstance(block.mlp, MoE):
            block.mlp.register_module("shared_experts", NoSharedExperts())
    return model


@torch.no_grad()
def _initialize(model: Model, seed: int) -> None:
    """Normal(0, initializer_range) for matrices, expert stacks and embeddings, each seeded by its name."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # The generator uses 32 bits of its seed only.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * model.config.initializer_range)


def costs(variant: Variant) -> Costs:
    """Counted on the meta device."""
    with torch.device("meta"):
        model = _blank_model(variant)
    config, length = variant.run.model, variant.run.train.sequence_length
    layers, modules = (cast(list[Block], list(blocks)) for blocks in (model.layers, model.mtp))
    weights = sum(_active(part, config) for part in (*layers, *modules))
    weights += model.lm_head.weight.numel() * (1 + len(modules))
    attention = sum(3 * _score_width(block) * length for block in (*layers, *modules))
    mtp = _count(model.mtp)
    cached = sum(_cache_elements(block) for block in layers)
    return Costs(_count(model) - mtp, mtp, 6 * weights + attention, cached)


def fitted(variant: Variant, cost: Callable[[Costs], int], target: int) -> Variant:
    """`variant` with the dense feed-forward width that brings one of its costs closest to `target`.

    Costs are linear in that width, so two points determine it.
    """

    def at(width: int) -> Variant:
        return replace(variant, run=replace(variant.run, model=replace(variant.run.model, intermediate_size=width)))

    first, slope = cost(costs(at(1))), cost(costs(at(2))) - cost(costs(at(1)))
    if slope <= 0 or first > target:
        raise ValueError(f"target is {target}; with a dense feed-forward of width 1 the variant already costs {first}")
    return at(1 + round((target - first) / slope))


def _count(module: nn.Module) -> int:
    """Parameters, shared ones once, and correction biases, as `ModelConfig.parameter_counts` counts them."""
    biases = sum(m.e_score_correction_bias.numel() for m in module.modules() if isinstance(m, Router))
    return sum(p.numel() for p in module.parameters()) + biases


def _active(block: Block, config: ModelConfig) -> int:
    """Weights that multiply one token's activations."""
    total = 0
    for module in block.modules():
        if isinstance(module, Linear | Router):
            total += module.weight.numel()
        elif isinstance(module, Experts):
            stack = module.gate_up_proj.numel() + module.down_proj.numel()
            total += stack * config.num_experts_per_tok // config.n_routed_experts
    return total


def _score_width(block: Block) -> int:
    """Multiply-adds per query and key, for scores and values, over all heads."""
    attention = cast(nn.Module, block.self_attn)
    if isinstance(attention, GroupedQueryAttention):
        return attention.heads * 2 * attention.width
    config = cast(MultiHeadLatentAttention, attention).config
    return config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)


def _cache_elements(block: Block) -> int:
    attention = cast(nn.Module, block.self_attn)
    if isinstance(attention, GroupedQueryAttention):
        return attention.cache_width
    return cast(MultiHeadLatentAttention, attention).config.cache_width
