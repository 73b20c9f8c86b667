"""The recipe as the ablations vary it: changes to a variant, and variants that several ablations start from."""

from dataclasses import replace
from typing import Any

from fathom.data.corpus import DataConfig
from fathom.lab.ablations.scales import Scale, base
from fathom.lab.ablations.variants import Costs, Variant


def with_model(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, model=replace(variant.run.model, **changes)))


def with_schedule(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, schedule=replace(variant.run.schedule, **changes)))


def with_train(variant: Variant, **changes: Any) -> Variant:
    return replace(variant, run=replace(variant.run, train=replace(variant.run.train, **changes)))


def with_learning_rate(variant: Variant, rate: float) -> Variant:
    return replace(variant, run=replace(variant.run, optimizer=replace(variant.run.optimizer, learning_rate=rate)))


def without_mtp(scale: Scale, data: DataConfig) -> Variant:
    """The recipe without MTP, which ablations 2 to 4 share: with all their measurements, so that it is trained once."""
    return replace(base(scale, data), measures=("denial", "drafting"))


def with_mtp(scale: Scale, data: DataConfig, modules: int) -> Variant:
    return replace(with_model(base(scale, data), num_nextn_predict_layers=modules), measures=("drafting",))


def parameters_of(cost: Costs) -> int:
    return cost.parameters


def flops_of(cost: Costs) -> int:
    return cost.flops_per_token


def plain_attention(variant: Variant, scale: Scale, kv_heads: int) -> Variant:
    return replace(with_model(variant, qk_rope_head_dim=scale.head_width, q_lora_rank=None), kv_heads=kv_heads)


def all_dense(variant: Variant) -> Variant:
    return with_model(variant, first_k_dense_replace=variant.run.model.num_hidden_layers)
