"""Parameters and FLOPs: exact on the released model, equal to built models' and to torch's own count."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from fathom.model.config import ModelConfig
from fathom.model.transformer import Model
from fathom.ops import cpu
from tests.model.configs import lively_model, model_configs, random_tokens, tiny


def test_the_released_model_is_counted_exactly() -> None:
    counts = ModelConfig().parameter_counts()
    assert counts.total == 671_026_419_200
    assert counts.active == 37_552_297_472
    assert counts.mtp == 11_610_068_224
    assert counts.embedding == 129280 * 7168
    assert counts.active - counts.embedding == 36_625_618_432
    assert counts.active_matrices == 36_624_596_992
    assert counts.mtp - 2 * 7168**2 == 11_507_307_776, "the module without eh_proj"


@settings(max_examples=50, deadline=None)
@given(model_configs())
def test_counts_equal_a_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Model(config)
    # parameters() yields a tied head once; the correction biases are buffers and count.
    in_modules = sum(t.numel() for t in (*model.mtp.parameters(), *model.mtp.buffers()))
    everything = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    counts = config.parameter_counts()
    assert counts.mtp == in_modules
    assert counts.total == everything - in_modules
    sparse_layers = config.num_moe_layers
    idle = config.n_routed_experts - config.num_experts_per_tok
    assert counts.total - counts.active == sparse_layers * idle * 3 * config.hidden_size * config.moe_intermediate_size


def test_bench_small_costs_123_8_megaflop_per_token() -> None:
    config = ModelConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=8, first_k_dense_replace=1, num_attention_heads=6,
        q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        intermediate_size=1024, n_routed_experts=32, moe_intermediate_size=256, num_experts_per_tok=4,
        n_group=4, topk_group=2, n_shared_experts=1, num_nextn_predict_layers=1,
    )  # fmt: skip
    assert round(config.flops_per_token(512) / 1e6, 1) == 123.8
    attention = 3 * 8 * 6 * (64 + 32 + 64)
    assert config.flops_per_token(1512) - config.flops_per_token(512) == 1000 * attention
    module = config.flops_per_token(512, mtp=True) - config.flops_per_token(512)
    assert module == 6 * config.parameter_counts().active_mtp_matrices + attention * 512 // 8


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"tie_word_embeddings": True}])
def test_flops_equal_torchs_count_of_a_dense_model(changes: dict[str, Any]) -> None:
    """torch counts the masked half of attention as well, so that part is taken from the shapes."""
    config = tiny(first_k_dense_replace=3, **changes)
    batch, length = 2, 16
    model, tokens_BS = lively_model(config), random_tokens(config, batch, length)
    with cpu.disabled(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    heads, widths = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    attention = 2 * batch * config.num_hidden_layers * heads * length * length * widths
    matrices = config.parameter_counts().active_matrices
    assert counter.get_total_flops() == 2 * batch * length * matrices + attention
    # Training costs three forward passes, causal attention half of the square.
    trained = config.flops_per_token(length) * batch * length
    assert trained == 3 * (counter.get_total_flops() - attention / 2)


def test_active_matrices_of_a_moe_model_equal_torchs_count() -> None:
    """The grouped matmuls of the experts are registered with torch's counter."""
    config = tiny()
    model, tokens_BS = lively_model(config), random_tokens(config, 1, 8)
    with cpu.disabled(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens_BS)
    widths = config.qk_head_dim + config.v_head_dim
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * 64 * widths
    assert counter.get_total_flops() - attention == 2 * 8 * config.parameter_counts().active_matrices
