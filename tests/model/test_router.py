"""The router against its definition, token by token in plain Python; the bias steers selection alone."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.router import Router, Routing
from tests.model.configs import model_configs, tiny

seeds = st.integers(0, 2**32 - 1)


def lively_router(config: ModelConfig, seed: int, shift: float = 0.0) -> tuple[Router, Tensor]:
    """A float64 router with a bias, and 12 tokens."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(config).double()
    weight_ED = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
    router.weight.data = weight_ED / config.hidden_size**0.5
    noise_E = torch.randn(config.n_routed_experts, generator=generator, dtype=torch.float64)
    router.e_score_correction_bias = noise_E + shift
    return router, torch.randn(12, config.hidden_size, generator=generator, dtype=torch.float64)


def by_definition(scores: list[float], bias: list[float], config: ModelConfig) -> dict[int, float]:
    """One token's experts and their weights, and nothing clever."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    candidates = [e for group in groups[: config.topk_group] for e in group]
    chosen = sorted(candidates, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) + 1e-20 if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


def as_choices(routing: Routing) -> list[dict[int, float]]:
    rows = zip(routing.topk_ids_NK.tolist(), routing.weights_NK.tolist(), strict=True)
    return [dict(zip(ids, weights, strict=True)) for ids, weights in rows]


@settings(max_examples=100, deadline=None)
@given(model_configs(), seeds, st.sampled_from([-5.0, -1.0, 0.0, 5.0]))
def test_choices_and_weights_equal_the_definition(config: ModelConfig, seed: int, shift: float) -> None:
    router, x_ND = lively_router(config, seed, shift)
    routing = router(x_ND)
    scores_NE = torch.sigmoid(x_ND @ router.weight.T)
    assert torch.allclose(routing.scores_NE, scores_NE, rtol=0, atol=1e-12)
    bias = router.e_score_correction_bias.tolist()
    for scores, found in zip(scores_NE.tolist(), as_choices(routing), strict=True):
        assert found == pytest.approx(by_definition(scores, bias, config), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(model_configs(), seeds)
def test_a_bias_that_is_equal_for_all_changes_nothing(config: ModelConfig, seed: int) -> None:
    router, x_ND = lively_router(config, seed)
    before = as_choices(router(x_ND))
    router.e_score_correction_bias = router.e_score_correction_bias - 100.0
    for one, other in zip(before, as_choices(router(x_ND)), strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_the_bias_moves_selection_and_never_enters_the_weights() -> None:
    config = tiny(n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False, routed_scaling_factor=1.0)
    router, x_ND = lively_router(config, 0)
    router.e_score_correction_bias = torch.tensor([9.0, 0, 0, 0, 0, 8.0, 0, 0], dtype=torch.float64)
    routing = router(x_ND)
    assert set(routing.topk_ids_NK.flatten().tolist()) == {0, 5}
    assert torch.equal(routing.weights_NK, routing.scores_NE.gather(1, routing.topk_ids_NK))


def test_normalised_weights_sum_to_the_scaling_factor() -> None:
    router, x_ND = lively_router(tiny(routed_scaling_factor=2.5), 0)
    assert torch.allclose(router(x_ND).weights_NK.sum(-1), torch.full((12,), 2.5, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(model_configs(), seeds)
def test_the_gate_learns_through_the_weights(config: ModelConfig, seed: int) -> None:
    """Finite differences of a weighted sum of the weights; none reaches the bias."""
    assume(config.num_experts_per_tok > 1 or not config.norm_topk_prob)
    router, x_ND = lively_router(config, seed)
    mix_NK = torch.randn(12, config.num_experts_per_tok, dtype=torch.float64)
    routing = router(x_ND)
    (grad_ED,) = torch.autograd.grad((routing.weights_NK * mix_NK).sum(), router.weight)

    step_ED = torch.randn_like(router.weight)
    ids_NK, values = routing.topk_ids_NK, []
    for sign in (1, -1):
        scores_NK = torch.sigmoid(x_ND @ (router.weight.detach() + sign * 1e-6 * step_ED).T).gather(1, ids_NK)
        if config.norm_topk_prob:
            scores_NK = scores_NK / scores_NK.sum(-1, keepdim=True)
        values.append((scores_NK * config.routed_scaling_factor * mix_NK).sum())
    slope = (values[0] - values[1]) / 2e-6
    assert torch.isclose((grad_ED * step_ED).sum(), slope, rtol=1e-5, atol=1e-7)
    assert not router.e_score_correction_bias.requires_grad


def test_bfloat16_activations_are_routed_in_float32() -> None:
    router, x_ND = lively_router(tiny(), 0)
    router = router.bfloat16()
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    x_ND = x_ND.bfloat16()
    routing = router(x_ND)
    assert routing.scores_NE.dtype == routing.weights_NK.dtype == torch.float32
    assert torch.equal(routing.scores_NE, (x_ND.float() @ router.weight.float().T).sigmoid())
