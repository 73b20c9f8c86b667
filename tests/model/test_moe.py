"""Experts and the exchange around them: whatever order tokens come in, they get their own sums back."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from fathom.model.moe import Experts, ExpertTokens, MoE
from tests.model.configs import enliven, tiny


class ReversingExchange:
    """Hands the experts their tokens last first, as an all-to-all hands over other ranks' in an order of its own."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dispatch(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> ExpertTokens:
        self.calls.append("dispatch")
        return ExpertTokens(x_ND.flip(0), topk_ids_NK.flip(0), weights_NK.flip(0))

    def combine(self, y_MD: Tensor, sent: ExpertTokens) -> Tensor:
        self.calls.append("combine")
        assert len(sent.x_MD) == len(y_MD)
        return y_MD.flip(0)


def test_tokens_go_through_the_exchange_and_come_back() -> None:
    config = tiny()
    experts = Experts(config).double()
    enliven(experts, 0)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(7, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    ids_NK = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(7)])
    weights_NK = torch.rand(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    inputs = x_ND, weights_NK, experts.gate_up_proj, experts.down_proj
    found = []
    for exchange in (experts.exchange, reversing := ReversingExchange()):
        experts.exchange = exchange
        y_ND = experts(x_ND, ids_NK, weights_NK)
        found.append([y_ND, *torch.autograd.grad((y_ND * torch.arange(7)[:, None]).sum(), inputs)])
    assert reversing.calls == ["dispatch", "combine"]
    for local, exchanged in zip(*found, strict=True):
        torch.testing.assert_close(exchanged, local, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_input_are_summed_in_one_order() -> None:
    """(experts + router) + shared experts, bit for bit: a run that resumes under another release stays exact."""
    config = tiny()
    moe = MoE(config)
    enliven(moe, 0)
    x_BSD = torch.randn(2, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))

    def leaf() -> Tensor:
        return x_BSD.clone().requires_grad_()

    whole, experts, router, shared = leaf(), leaf(), leaf(), leaf()
    out_BSD, routing = moe(whole)
    (out_BSD.square().sum() + cast(Tensor, routing.balance_loss)).backward()
    routing = moe.gate(router)
    routed_ND = moe.experts(
        experts.flatten(0, 1), routing.topk_ids_BSK.flatten(0, 1), routing.weights_BSK.flatten(0, 1)
    )
    apart_BSD = moe.shared_experts(shared) + routed_ND.view_as(x_BSD)
    assert torch.equal(apart_BSD, out_BSD)
    (apart_BSD.square().sum() + routing.balance_loss).backward()
    parts = [cast(Tensor, part.grad) for part in (experts, router, shared)]
    assert torch.equal(cast(Tensor, whole.grad), parts[0] + parts[1] + parts[2])
    assert not torch.equal(cast(Tensor, whole.grad), parts[0] + (parts[1] + parts[2])), "too round to prove anything"


class HalfExchange:
    """One of two ranks, each of which holds half of the experts and computes its part of every token's sum."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def dispatch(self, x_ND: Tensor, topk_ids_NK: Tensor, weights_NK: Tensor) -> ExpertTokens:
        local_NK = topk_ids_NK - self.first
        held_NK = (local_NK >= 0) & (local_NK < self.count)
        return ExpertTokens(x_ND, local_NK.masked_fill(~held_NK, -1), weights_NK)

    def combine(self, y_MD: Tensor, sent: ExpertTokens) -> Tensor:
        return y_MD


def test_experts_held_in_halves_add_up_to_the_whole() -> None:
    config = tiny()
    whole = Experts(config).double()
    enliven(whole, 0)
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(9, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    ids_NK = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(9)])
    weights_NK = torch.rand(9, 3, generator=generator, dtype=torch.float64).requires_grad_()
    expected_ND = whole(x_ND, ids_NK, weights_NK)
    halves = [Experts(replace(config, n_routed_experts=4, n_group=2)).double() for _ in range(2)]
    parts = []
    for number, half in enumerate(halves):
        half.exchange = HalfExchange(4 * number, 4)
        half.gate_up_proj.data, half.down_proj.data = (
            w[4 * number :][:4] for w in (whole.gate_up_proj, whole.down_proj)
        )
        parts.append(half(x_ND, ids_NK, weights_NK))
    torch.testing.assert_close(parts[0] + parts[1], expected_ND, rtol=1e-12, atol=1e-12)
    grads = [
        torch.autograd.grad(y_ND.square().sum(), (x_ND, weights_NK)) for y_ND in (parts[0] + parts[1], expected_ND)
    ]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
