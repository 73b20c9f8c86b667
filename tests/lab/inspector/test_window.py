"""The record of a pass over a window, against the model's own outputs, its cache, and attention written out by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.lab.inspector.attention import LEAST_WEIGHT, attention_weights, strongest
from fathom.lab.inspector.window import trace_window
from fathom.model.config import ModelConfig
from fathom.model.rope import rope_table
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, relative_error, rows_of_a_cache, tiny

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(), st.integers(4, 12), seeds)
@torch.no_grad()
def test_it_records_what_the_model_returns(config: ModelConfig, length: int, seed: int) -> None:
    model, tokens_S = lively_model(config, seed), random_tokens(config, 1, length, seed)[0]
    out = model(tokens_S[None], mtp=True)
    window = trace_window(model, tokens_S)
    assert window.attention == ()

    logp_SO = out.logits_BSO[0].log_softmax(-1)
    assert torch.equal(window.main.top_N, logp_SO[:-1].argmax(-1))
    expected_N = torch.nn.functional.cross_entropy(out.logits_BSO[0, :-1], tokens_S[1:], reduction="none")
    torch.testing.assert_close(window.main.target_nats_N, expected_N)
    torch.testing.assert_close(window.main.top_p_N, logp_SO[:-1].exp().amax(-1))

    assert len(window.choices) == len(out.router.topk_ids_LBSK)
    for router, (choice, ids_BSK) in enumerate(zip(window.choices, out.router.topk_ids_LBSK, strict=True)):
        ahead = max(0, router + 1 - config.num_moe_layers)
        assert (choice.experts_SK[:ahead] == -1).all()
        assert torch.equal(choice.experts_SK[ahead:], ids_BSK[0, : length - ahead])
        sums = choice.weights_SK[ahead:].sum(-1)
        if config.norm_topk_prob:
            torch.testing.assert_close(sums, torch.full_like(sums, config.routed_scaling_factor))

    for k, (draft, logits_BSO) in enumerate(zip(window.drafts, out.mtp_logits, strict=True), start=1):
        # The module at position i and the main head at i+k predict the same token.
        logits_NO = logits_BSO[0, : length - k - 1]
        assert torch.equal(draft.top_N, logits_NO.argmax(-1))
        choice_N = out.logits_BSO[0, k : length - 1].argmax(-1)
        torch.testing.assert_close(
            draft.target_nats_N, torch.nn.functional.cross_entropy(logits_NO, choice_N, reduction="none")
        )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(modules=(0, 0)), st.integers(2, 9), seeds)
@torch.no_grad()
def test_latents_are_those_that_are_cached(config: ModelConfig, length: int, seed: int) -> None:
    model, tokens_BS = lively_model(config, seed), random_tokens(config, 1, length, seed)
    cache_LBTW = torch.zeros(config.num_hidden_layers, 1, length, config.cache_width)
    model.forward_with_cache(tokens_BS[0], rows_of_a_cache(torch.arange(length)[None], cache_LBTW))
    for c_SC, cached_BTW in zip(trace_window(model, tokens_BS[0]).latents, cache_LBTW, strict=True):
        assert relative_error(c_SC, cached_BTW[0, :, : config.kv_lora_rank]) < 1e-4


def plain_weights(model: Model, x_TD: Tensor) -> Tensor:
    """Layer 0's attention by the formulas: keys and queries of every head built and rotated one by one; (H, T, T)."""
    config, attention = model.config, model.layers[0].self_attn
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    kv_TW = attention.kv_a_proj_with_mqa(x_TD)
    c_TC = attention.kv_a_layernorm(kv_TW[:, : config.kv_lora_rank])
    table = rope_table(config, torch.arange(len(x_TD)))

    def turned(v_R: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(v_R.double().reshape(-1, 2))
        return torch.view_as_real(pairs * torch.complex(table.cos[position], table.sin[position])).flatten()

    weights = torch.zeros(config.num_attention_heads, len(x_TD), len(x_TD), dtype=torch.float64)
    k_THY = attention.kv_b_proj(c_TC).unflatten(-1, (config.num_attention_heads, -1))
    q_THX = attention.queries(x_TD[None])[0]
    for head in range(config.num_attention_heads):
        for i in range(len(x_TD)):
            scores = [
                q_THX[i, head, :nope].double() @ k_THY[j, head, :nope].double()
                + turned(q_THX[i, head, nope:], i) @ turned(kv_TW[j, -rope:], j)
                for j in range(i + 1)
            ]
            weights[head, i, : i + 1] = (torch.stack(scores) * attention.scale).softmax(0)
    return weights


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(model_configs(modules=(0, 0)), st.integers(1, 6), seeds)
@torch.no_grad()
def test_attention_through_the_latent_is_plain_attention(config: ModelConfig, length: int, seed: int) -> None:
    model = lively_model(config, seed)
    x_TD = torch.randn(length, config.hidden_size, generator=torch.Generator().manual_seed(seed))
    rope, queries = rope_table(config, torch.arange(length + 3)), range(0, length, 2)
    found_HQT = attention_weights(model.layers[0].self_attn, x_TD, rope, queries)
    expected_HTT = plain_weights(model, x_TD)
    torch.testing.assert_close(found_HQT.double(), expected_HTT[:, list(queries)], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_values_under_these_weights_are_the_layers_output() -> None:
    model, config = lively_model(tiny(), seed=4), tiny()
    x_TD = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(4))
    rope, attention = rope_table(config, torch.arange(9)), model.layers[1].self_attn
    weights_HTT = attention_weights(attention, x_TD, rope, range(9))
    kv_THY = attention.kv_b_proj(attention.latents(x_TD[None], rope)[0][0]).unflatten(-1, (3, -1))
    heads_THV = torch.einsum("hst,thv->shv", weights_HTT, kv_THY[..., config.qk_nope_head_dim :])
    assert relative_error(attention.o_proj(heads_THV.flatten(1)), attention(x_TD[None], rope)[0]) < 1e-5


def test_the_strongest_keys_are_kept() -> None:
    weights_HQT = torch.tensor([[[0.5, 0.008, 0.3, 0.192], [1.0, 0.0, 0.0, 0.0]]])
    kept = strongest(weights_HQT, 3)
    assert kept.keys_HQM[0, 0].tolist() == [0, 2, 3]
    torch.testing.assert_close(kept.weights_HQM[0], torch.tensor([[0.5, 0.3, 0.192], [1.0, 0.0, 0.0]]))
    assert LEAST_WEIGHT == 0.01
    assert strongest(weights_HQT, 9).weights_HQM[0, 0].tolist()[-1] == 0


@torch.no_grad()
def test_attention_of_chosen_tokens_in_a_window() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, tokens_S = lively_model(config, seed=3), random_tokens(config, 1, 10)[0]
    some, all_ = trace_window(model, tokens_S, [2, 5], keys=4), trace_window(model, tokens_S, range(10), keys=4)
    assert len(some.attention) == config.num_hidden_layers
    for layer, whole in zip(some.attention, all_.attention, strict=True):
        assert layer.keys_HQM.shape == (config.num_attention_heads, 2, 4)
        torch.testing.assert_close(layer.weights_HQM, whole.weights_HQM[:, [2, 5]])
        held = layer.weights_HQM > 0
        assert torch.equal(layer.keys_HQM[held], whole.keys_HQM[:, [2, 5]][held])


@pytest.mark.parametrize("length", [2, 3])
def test_windows_too_short_for_every_module(length: int) -> None:
    config = replace(tiny(), num_nextn_predict_layers=2)
    window = trace_window(lively_model(config), random_tokens(config, 1, length)[0])
    assert len(window.drafts) == length - 2
