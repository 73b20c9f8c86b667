"""A text in windows: every token is predicted once, excerpts lie inside windows, for any architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.lab.inspector.prediction import costliest
from fathom.lab.inspector.trace import ATTENTION_BUDGET, KEYS_KEPT, Predictions, plan_windows, trace_text
from fathom.model.config import ModelConfig
from tests.model.configs import lively_model, tiny

BEGIN = 0


@given(st.integers(1, 5000), st.integers(1, 700), st.integers(1, 1500), st.sampled_from([tiny(), ModelConfig()]))
def test_plans_cover_the_text_and_keep_within_bounds(tokens: int, window: int, shown: int, config: ModelConfig) -> None:
    plan = plan_windows(config, tokens, window, shown)
    assert [place for start, end in plan.windows for place in range(start, end)] == list(range(tokens))
    assert max(end - start for start, end in plan.windows) <= min(window, config.max_position_embeddings - 1)
    assert 1 <= len(plan.excerpts) <= len(plan.windows)
    assert all(1 <= size <= plan.windows[n][1] - plan.windows[n][0] for n, size in plan.excerpts.items())
    assert sum(plan.excerpts.values()) <= shown
    kept = sum(size // plan.every for size in plan.excerpts.values())
    assert kept * config.num_hidden_layers * config.num_attention_heads * KEYS_KEPT <= ATTENTION_BUDGET


def test_excerpts_are_spread_over_the_text() -> None:
    plan = plan_windows(ModelConfig(), tokens=10_000, window=500, shown=1024)
    assert sorted(plan.excerpts) == [2, 7, 12, 17]


@torch.no_grad()
def test_each_window_is_a_separate_pass_after_bos() -> None:
    config = tiny(num_nextn_predict_layers=2)
    model, tokens = lively_model(config, seed=1), np.random.default_rng(0).integers(2, 61, 23).tolist()
    trace = trace_text(model, tokens, BEGIN, plan_windows(config, 23, window=10, shown=8))
    nats, experts, latents = [], [], []
    for start in (0, 10, 20):
        ids_BS = torch.tensor([[BEGIN, *tokens[start : start + 10]]])
        out = model(ids_BS)
        nats += torch.nn.functional.cross_entropy(out.logits_BSO[0, :-1], ids_BS[0, 1:], reduction="none").tolist()
        experts.append(torch.stack([ids_BSK[0, 1:] for ids_BSK in out.router.topk_ids_LBSK], 1))
        normed_BSD = model.layers[0].input_layernorm(model.embed_tokens(ids_BS))
        kv_BSW = model.layers[0].self_attn.kv_a_proj_with_mqa(normed_BSD)
        latents.append(model.layers[0].self_attn.kv_a_layernorm(kv_BSW[..., : config.kv_lora_rank])[0, 1:])
    np.testing.assert_allclose(trace.main.nats_N, nats, rtol=1e-4)
    expected_NLK = torch.cat(experts).numpy()
    np.testing.assert_array_equal(trace.experts_LNK[: config.num_moe_layers].swapaxes(0, 1), expected_NLK)
    expected = np.linalg.svd(torch.cat(latents).numpy(), compute_uv=False)
    np.testing.assert_allclose(trace.spectra[0].singular_values(), expected, rtol=1e-3)

    # Module 2 drafts its first token three positions after BOS; its first input is two positions after it.
    assert [place for place in range(23) if trace.drafts[1].top_N[place] < 0] == [0, 1, 10, 11, 20, 21]
    assert [place for place in range(23) if trace.experts_LNK[-1, place, 0] < 0] == [0, 10, 20]
    [excerpt] = trace.excerpts
    assert excerpt.start == 10 and excerpt.queries_Q == tuple(range(1, 9))
    np.testing.assert_array_equal(excerpt.experts_LTK[0, 1:], expected_NLK[10:18, 0])


V2 = tiny(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1, q_lora_rank=None)


@pytest.mark.parametrize("config", [V2, tiny(first_k_dense_replace=3), replace(V2, first_k_dense_replace=0)])
def test_other_architectures(config: ModelConfig) -> None:
    trace = trace_text(lively_model(config), list(range(2, 40)), BEGIN, plan_windows(config, 38, 20, 30))
    assert trace.experts_LNK.shape == (config.num_moe_layers, 38, 3)
    assert (trace.experts_LNK >= 0).all() and trace.drafts == ()
    assert np.isfinite(trace.main.nats_N).all()


def test_the_costliest_drafts_come_first() -> None:
    def predictions(first_p: list[float], nats: list[float]) -> Predictions:
        return Predictions(np.zeros(4, np.int64), np.array(first_p, np.float32), np.array(nats, np.float32))

    main, module = predictions([0.5, 0.9, 0.9, 0.1], [0] * 4), predictions([0] * 4, [2.0, 2.0, 9.0, 3.0])
    assert costliest(module, main, np.array([True, True, False, True])).tolist() == [1, 0, 3]
