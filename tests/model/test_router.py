"""The router against its definition, token by token in plain Python; the bias moves selection alone."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.balance import sequence_balance_loss
from fathom.model.config import ModelConfig
from fathom.model.router import Router, RouterOutput
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
    """One token's experts and their weights, as the report writes them."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    groups.sort(key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    candidates = [e for group in groups[: config.topk_group] for e in group]
    chosen = sorted(candidates, key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) + 1e-20 if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


def as_choices(routing: RouterOutput) -> list[dict[int, float]]:
    rows = zip(routing.topk_ids_BSK[0].tolist(), routing.weights_BSK[0].tolist(), strict=True)
    return [dict(zip(ids, weights, strict=True)) for ids, weights in rows]


@settings(max_examples=100, deadline=None)
@given(model_configs(), seeds, st.sampled_from([-5.0, -1.0, 0.0, 5.0]))
def test_choices_and_weights_equal_the_definition(config: ModelConfig, seed: int, shift: float) -> None:
    router, x_ND = lively_router(config, seed, shift)
    routing = router(x_ND[None])
    scores_NE = torch.sigmoid(x_ND @ router.weight.T)
    loss = sequence_balance_loss(scores_NE[None], config.num_experts_per_tok)
    assert torch.allclose(routing.balance_loss, loss, rtol=0, atol=1e-12)
    bias = router.e_score_correction_bias.tolist()
    for scores, found in zip(scores_NE.tolist(), as_choices(routing), strict=True):
        assert found == pytest.approx(by_definition(scores, bias, config), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(model_configs(), seeds)
def test_a_bias_that_is_equal_for_all_changes_nothing(config: ModelConfig, seed: int) -> None:
    router, x_ND = lively_router(config, seed)
    before = as_choices(router(x_ND[None]))
    router.e_score_correction_bias = router.e_score_correction_bias - 100.0
    for one, other in zip(before, as_choices(router(x_ND[None])), strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_the_bias_moves_selection_and_never_enters_the_weights() -> None:
    config = tiny(n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=False, routed_scaling_factor=1.0)
    router, x_ND = lively_router(config, 0)
    router.e_score_correction_bias = torch.tensor([9.0, 0, 0, 0, 0, 8.0, 0, 0], dtype=torch.float64)
    routing = router(x_ND[None])
    assert set(routing.topk_ids_BSK.flatten().tolist()) == {0, 5}
    scores_1NE = torch.sigmoid(x_ND @ router.weight.T)[None]
    assert torch.allclose(routing.weights_BSK, scores_1NE.gather(2, routing.topk_ids_BSK), rtol=0, atol=1e-12)


def test_normalised_weights_sum_to_the_scaling_factor() -> None:
    router, x_ND = lively_router(tiny(routed_scaling_factor=2.5), 0)
    assert torch.allclose(router(x_ND[None]).weights_BSK[0].sum(-1), torch.full((12,), 2.5, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(model_configs(), seeds)
def test_the_gates_gradient_flows_through_the_weights(config: ModelConfig, seed: int) -> None:
    """Finite differences of a weighted sum of the weights; none reaches the bias."""
    assume(config.num_experts_per_tok > 1 or not config.norm_topk_prob)
    router, x_ND = lively_router(config, seed)
    mix_NK = torch.randn(12, config.num_experts_per_tok, dtype=torch.float64)
    routing = router(x_ND[None])
    (grad_ED,) = torch.autograd.grad((routing.weights_BSK[0] * mix_NK).sum(), router.weight)

    step_ED = torch.randn_like(router.weight)
    ids_NK, values = routing.topk_ids_BSK[0], []
    for sign in (1, -1):
        scores_NK = torch.sigmoid(x_ND @ (router.weight.detach() + sign * 1e-6 * step_ED).T).gather(1, ids_NK)
        if config.norm_topk_prob:
            scores_NK = scores_NK / scores_NK.sum(-1, keepdim=True)
        values.append((scores_NK * config.routed_scaling_factor * mix_NK).sum())
    slope = (values[0] - values[1]) / 2e-6
    assert torch.isclose((grad_ED * step_ED).sum(), slope, rtol=1e-5, atol=1e-7)
    assert not router.e_score_correction_bias.requires_grad


def test_bfloat16_activations_are_routed_in_float32() -> None:
    config = tiny()
    router, x_ND = lively_router(config, 0)
    router = router.bfloat16()
    router.e_score_correction_bias = router.e_score_correction_bias.float()
    x_ND = x_ND.bfloat16()
    routing = router(x_ND[None])
    scores_1NE = (x_ND.float() @ router.weight.float().T).sigmoid()[None]
    weights_1NK = scores_1NE.gather(2, routing.topk_ids_BSK)
    weights_1NK = weights_1NK / (weights_1NK.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor
    assert routing.weights_BSK.dtype == torch.float32
    assert torch.equal(routing.weights_BSK, weights_1NK)


@pytest.mark.parametrize("balance_loss", [True, False])
def test_tokens_per_expert_counts_the_choices(balance_loss: bool) -> None:
    config = tiny()
    router, x_ND = lively_router(config, 0)
    routing = router(x_ND.view(3, 4, -1), balance_loss=balance_loss)
    counts = [int((routing.topk_ids_BSK == expert).sum()) for expert in range(config.n_routed_experts)]
    assert routing.tokens_per_expert_E.tolist() == counts and routing.tokens_per_expert_E.dtype == torch.int64
    assert (routing.balance_loss is not None) == balance_loss


@pytest.mark.parametrize("balance_loss", [True, False])
def test_replayed_experts_are_taken_with_the_live_scores_weights(balance_loss: bool) -> None:
    """Against the definition: any ids, weights from the scores of those ids, loss as if nothing were replayed."""
    config = tiny()
    router, x_ND = lively_router(config, 0)
    ids_NK = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n))[:3] for n in range(12)])
    replayed = router(x_ND.view(3, 4, -1), ids_NK.view(3, 4, 3).to(torch.int16), balance_loss=balance_loss)
    assert torch.equal(replayed.topk_ids_BSK.flatten(0, 1), ids_NK) and replayed.topk_ids_BSK.dtype == torch.int64
    for scores, ids, weights in zip(
        torch.sigmoid(x_ND @ router.weight.T).tolist(),
        ids_NK.tolist(),
        replayed.weights_BSK.flatten(0, 1).tolist(),
        strict=True,
    ):
        total = sum(scores[e] for e in ids) + 1e-20
        assert weights == pytest.approx([scores[e] / total * config.routed_scaling_factor for e in ids], rel=1e-9)
    assert replayed.tokens_per_expert_E.tolist() == [int((ids_NK == e).sum()) for e in range(8)]
    live = router(x_ND.view(3, 4, -1), balance_loss=balance_loss)
    assert not torch.equal(live.topk_ids_BSK, replayed.topk_ids_BSK)
    assert replayed.balance_loss == live.balance_loss
