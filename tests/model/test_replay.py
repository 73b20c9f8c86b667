"""Replaying a routing through the whole model: a model's own changes nothing, another's is used as it is."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.config import ModelConfig
from fathom.model.outputs import HiddenStates
from fathom.model.transformer import Model
from tests.model.configs import lively_model, model_configs, random_tokens, tiny

seeds = st.integers(0, 2**32 - 1)


def gradients(model: Model, hidden: HiddenStates) -> list[Tensor]:
    loss = sum(((h_BSD**2).sum() for h_BSD in hidden.mtp_h_BSD), (hidden.h_BSD**2).sum() + hidden.router.balance_loss)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


@settings(max_examples=15, deadline=None)
@given(model_configs(), seeds, st.booleans())
def test_a_models_own_routing_changes_no_bit(config: ModelConfig, seed: int, recompute: bool) -> None:
    model, tokens_BS = lively_model(config, seed), random_tokens(config, 2, 5, seed)
    live = model.forward_hidden(tokens_BS, mtp=True)
    ids_LBSK = [ids_BSK.to(torch.int16) for ids_BSK in live.router.topk_ids_LBSK[: config.num_moe_layers]]
    replayed = model.forward_hidden(tokens_BS, mtp=True, topk_ids_LBSK=ids_LBSK, activation_checkpointing=recompute)
    assert torch.equal(live.h_BSD, replayed.h_BSD)
    assert all(map(torch.equal, live.mtp_h_BSD, replayed.mtp_h_BSD))
    assert all(map(torch.equal, gradients(model, live), gradients(model, replayed)))


@torch.no_grad()
def test_another_routing_is_used_as_it_is() -> None:
    """As in a model whose bias forces these experts."""
    config = tiny(n_group=1, topk_group=1, num_nextn_predict_layers=1)
    model, tokens_BS = lively_model(config, dtype=torch.float64), random_tokens(config, 2, 5)
    ids_LBSK = torch.tensor([[1, 4, 6], [0, 2, 7]]).view(2, 1, 1, 3).expand(2, 2, 5, 3)
    replayed = model.forward_hidden(tokens_BS, mtp=True, topk_ids_LBSK=ids_LBSK)
    for layer, router in enumerate(model.routers()[:2]):
        router.e_score_correction_bias.zero_()[ids_LBSK[layer, 0, 0]] = 9.0
    forced = model.forward_hidden(tokens_BS, mtp=True)
    torch.testing.assert_close(replayed.h_BSD, forced.h_BSD, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(replayed.mtp_h_BSD[0], forced.mtp_h_BSD[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(replayed.router.tokens_per_expert_LE, forced.router.tokens_per_expert_LE)


@pytest.mark.parametrize(
    ("ids_LBSK", "said"),
    [
        (torch.zeros(1, 2, 5, 3, dtype=torch.int16), r"it must have 2 of shape \(2, 5, 3\)"),
        (torch.zeros(2, 2, 4, 3, dtype=torch.int16), r"it must have 2 of shape \(2, 5, 3\)"),
        ([torch.zeros(2, 5, 3)] * 2, "is torch.float32; it must be integers"),
        (torch.full((2, 2, 5, 3), 8), "holds 8 to 8; it must be from 0 to 7"),
        (torch.full((2, 2, 5, 3), -1), "holds -1 to -1; it must be from 0 to 7"),
    ],
    ids=["layers", "length", "type", "too high", "negative"],
)
def test_a_wrong_routing_is_named(ids_LBSK: Tensor | Sequence[Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Model(tiny()).forward_hidden(torch.zeros(2, 5, dtype=torch.int64), topk_ids_LBSK=ids_LBSK)
