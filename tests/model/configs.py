"""Small models for the tests: a fixed one, random shapes for hypothesis, random weights, and their inputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from fathom.config import ConfigError
from fathom.model.cached_batch import CachedBatch, DecodeBatch, VarlenBatch
from fathom.model.config import ModelConfig
from fathom.model.rope_scaling import YarnScaling
from fathom.model.transformer import Model
from fathom.ops.attention import SeqLens

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=3,
    q_lora_rank=10,
    kv_lora_rank=14,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
    max_position_embeddings=128,
)


def tiny(**changes: Any) -> ModelConfig:
    """A model with every part in it, small enough for float64 and finite differences."""
    return replace(TINY, **changes)


@st.composite
def yarns(draw: st.DrawFn) -> YarnScaling:
    """Every way to give the two temperatures: absent, equal, unequal; short and long original contexts."""
    beta_slow = draw(st.sampled_from([0.5, 1.0, 2.0]))
    return YarnScaling(
        factor=draw(st.sampled_from([0.5, 1.0, 1.5, 4.0, 40.0])),
        original_max_position_embeddings=draw(st.sampled_from([4, 16, 100, 4096])),
        beta_fast=beta_slow * draw(st.sampled_from([2.0, 16.0, 32.0])),
        beta_slow=beta_slow,
        mscale=draw(st.sampled_from([0.0, 0.7, 1.0])),
        mscale_all_dim=draw(st.sampled_from([0.0, 0.8, 1.0])),
    )


@st.composite
def model_configs(draw: st.DrawFn, modules: tuple[int, int] = (0, 2)) -> ModelConfig:
    """Any shape the architecture allows, widths that are no multiples of 16 bytes included."""
    groups, group_size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    depth = draw(st.integers(1, 4))
    return ModelConfig(
        vocab_size=draw(st.integers(7, 90)),
        hidden_size=draw(st.one_of(st.integers(9, 40), st.sampled_from([16, 32, 64]))),
        intermediate_size=draw(st.integers(5, 48)),
        moe_intermediate_size=draw(st.one_of(st.integers(3, 24), st.sampled_from([8, 16]))),
        num_hidden_layers=depth,
        first_k_dense_replace=draw(st.integers(0, depth)),
        num_attention_heads=draw(st.integers(1, 4)),
        q_lora_rank=draw(st.none() | st.integers(3, 24)),
        kv_lora_rank=draw(st.integers(3, 24)),
        qk_nope_head_dim=draw(st.integers(1, 12)),
        qk_rope_head_dim=2 * draw(st.integers(1, 6)),
        v_head_dim=draw(st.integers(1, 12)),
        n_routed_experts=groups * group_size,
        n_shared_experts=draw(st.integers(1, 2)),
        num_experts_per_tok=draw(st.integers(1, topk_group * group_size)),
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([0.5, 1.0, 2.5])),
        num_nextn_predict_layers=draw(st.integers(*modules)),
        max_position_embeddings=128,
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 50000.0])),
        rope_scaling=draw(st.none() | yarns()),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.02,
    )


@torch.no_grad()
def enliven(model: torch.nn.Module, seed: int, std: float = 0.15) -> None:
    """Random weights, norms around 1, and biases of both signs, large enough to decide selections."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre, spread = (1.0, 0.2) if parameter.dim() == 1 else (0.0, std)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(centre + spread * noise)
        assert parameter.dim() > 1 or "norm" in name
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.4 * torch.randn(buffer.shape, generator=generator))


def lively_model(config: ModelConfig, seed: int = 0, std: float = 0.15, dtype: torch.dtype | None = None) -> Model:
    """A model with random weights, in evaluation mode."""
    model = Model(config)
    if dtype is not None:
        model = model.to(dtype)
    enliven(model, seed, std)
    return model.eval()


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def assert_says(error: pytest.ExceptionInfo[ConfigError], *words: object) -> None:
    message = str(error.value)
    for word in words:
        assert str(word) in message, f"{word!r} is not in: {message}"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def rows_of_a_cache(
    positions_BS: Tensor, cache_LBTW: Tensor, visible: int | None = None, expand: bool = False
) -> CachedBatch:
    """Sequences that each have a row of slots of their own, of which the first `visible` are attended."""
    layers, rows, slots, width = cache_LBTW.shape
    firsts_B1 = torch.arange(rows)[:, None] * slots
    slots_BT = firsts_B1 + torch.arange(visible or slots)
    slot_mapping_N = (firsts_B1 + positions_BS).flatten()
    sub_batch: DecodeBatch | VarlenBatch = DecodeBatch(positions_BS, slots_BT)
    if expand:
        lengths = SeqLens.of([positions_BS.shape[1]] * rows, [slots_BT.shape[1]] * rows, positions_BS.device)
        sub_batch = VarlenBatch(positions_BS.flatten(), slots_BT.flatten(), lengths)
    return CachedBatch((sub_batch,), slot_mapping_N, cache_LBTW.view(layers, rows * slots, width))


def boundaries(lengths: list[list[int]]) -> Tensor:
    """cu_seqlens of rows whose segments have these lengths."""
    return torch.tensor([0, *(length for row in lengths for length in row)], dtype=torch.int32).cumsum(0).int()


@st.composite
def packed_rows(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the segments of one to three rows of equal length."""
    length = draw(st.integers(2, 14))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4)))
        rows.append([end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)])
    return rows
