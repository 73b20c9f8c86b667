"""Grouped experts against the loop over experts: outputs and all gradients, at awkward sizes."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.ops import cpu
from fathom.ops.moe import dispatch, routed_experts, routed_experts_reference
from fathom.ops.moe import experts as experts_module
from fathom.ops.moe.permute import padded_loads
from tests.ops.errors import scale_free_error

ALIGNED, RAGGED = (16, 8), (13, 7)
"""(D, F): rows of float32 and bfloat16 that are multiples of 16 bytes, and rows that are none."""


class Case:
    """Random inputs; `ids_NK` are the tokens' experts."""

    def __init__(self, ids_NK: Tensor, experts: int, widths: tuple[int, int], seed: int = 0) -> None:
        (tokens, choices), (hidden, width) = ids_NK.shape, widths
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.ids_NK, self.experts = ids_NK, experts
        self.x_ND = random(tokens, hidden)
        self.weights_NK = random(tokens, choices).sigmoid()
        self.gate_up_EGD = random(experts, 2 * width, hidden) / hidden**0.5
        self.down_EDF = random(experts, hidden, width) / width**0.5
        self.upstream_ND = random(tokens, hidden)

    def run(self, fast: bool, dtype: torch.dtype) -> list[Tensor]:
        """Output, then the gradients of x, weights, gate_up and down, given a fixed gradient from above."""
        x_ND, gate_up_EGD, down_EDF = (
            t.to(dtype).requires_grad_() for t in (self.x_ND, self.gate_up_EGD, self.down_EDF)
        )
        # The router's weights stay float32 under bfloat16 activations.
        weights_NK = self.weights_NK.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        if fast:
            out_ND = routed_experts(x_ND, dispatch(self.ids_NK, self.experts), weights_NK, gate_up_EGD, down_EDF)
        else:
            out_ND = routed_experts_reference(x_ND, self.ids_NK, weights_NK, gate_up_EGD, down_EDF)
        inputs = (x_ND, weights_NK, gate_up_EGD, down_EDF)
        grads = torch.autograd.grad(out_ND, inputs, self.upstream_ND.to(dtype))
        assert out_ND.dtype == dtype and all(g.dtype == i.dtype for g, i in zip(grads, inputs, strict=True))
        return [out_ND.detach(), *grads]


def random_ids(tokens: int, choices: int, experts: int, seed: int = 0) -> Tensor:
    """Every token's choices, no expert twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :choices]


def without(ids_NK: Tensor, *experts: int) -> Tensor:
    """−1 for choices of these experts: they are not here."""
    return ids_NK.masked_fill(torch.isin(ids_NK, torch.tensor(experts)), -1)


ROUTINGS = {
    "one token": (random_ids(1, 2, 5), 5),
    "odd count": (random_ids(37, 3, 7), 7),
    "experts without tokens": (random_ids(9, 2, 3) + 1, 6),
    "all to the last expert": (torch.full((11, 1), 3), 4),
    "all to the first expert": (torch.zeros(5, 1, dtype=torch.int64), 4),
    "every expert": (random_ids(6, 4, 4), 4),
    "enough to pad the rows": (random_ids(150, 2, 4), 4),
    "padding, and experts without tokens": (random_ids(800, 2, 3) + 1, 6),
    "padding, and all to one expert": (torch.full((1030, 1), 2), 4),
    "one expert": (torch.zeros(3, 1, dtype=torch.int64), 1),
    "some choices are -1": (without(random_ids(37, 3, 7), 2, 5), 7),
    "padding, and some choices are -1": (without(random_ids(800, 3, 4), 0, 3), 4),
    "all choices are -1": (torch.full((5, 2), -1), 3),
}


@pytest.mark.parametrize("widths", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_float32_equals_the_reference(routing: tuple[Tensor, int], widths: tuple[int, int], kernels: bool) -> None:
    case = Case(*routing, widths)
    expected = case.run(False, torch.float32)
    with nullcontext() if kernels else cpu.disabled():
        found = case.run(True, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 9), st.data(), st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape_equals_the_reference(
    tokens: int, experts: int, data: st.DataObject, widths: tuple[int, int], seed: int
) -> None:
    choices = data.draw(st.integers(1, experts))
    ids_NK = without(random_ids(tokens, choices, experts, seed), *data.draw(st.sets(st.integers(0, experts - 1))))
    case = Case(ids_NK, experts, widths, seed)
    for found, expected in zip(case.run(True, torch.float64), case.run(False, torch.float64), strict=True):
        assert (found - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("widths", [(64, 32), (60, 30)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("routing", [ROUTINGS["odd count"], ROUTINGS["one token"]], ids=["odd", "one token"])
def test_bfloat16_is_as_exact_as_the_reference(routing: tuple[Tensor, int], widths: tuple[int, int]) -> None:
    case = Case(*routing, widths)
    fast, plain, exact = (
        case.run(True, torch.bfloat16), case.run(False, torch.bfloat16), case.run(False, torch.float64)
    )  # fmt: skip
    for found, reference, truth in zip(fast, plain, exact, strict=True):
        assert scale_free_error(found, truth) <= 2 * scale_free_error(reference, truth) + 1e-6


@pytest.mark.parametrize("routing", [ROUTINGS["odd count"], ROUTINGS["experts without tokens"]])
def test_float32_weights_with_bfloat16_activations(routing: tuple[Tensor, int]) -> None:
    """Float32 weights rounded inside give what weights rounded before give; their gradients round to the same."""
    case = Case(*routing, ALIGNED)
    order, weights_NK = dispatch(case.ids_NK, case.experts), case.weights_NK.float()
    upstream_ND = case.upstream_ND.bfloat16()

    def run(x_ND: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, rounded: bool) -> list[Tensor]:
        inputs = [t.requires_grad_() for t in (x_ND, gate_up_EGD, down_EDF)]
        used = [t.bfloat16() for t in inputs[1:]] if rounded else inputs[1:]
        out_ND = routed_experts(x_ND, order, weights_NK, *used)
        return [out_ND, *torch.autograd.grad(out_ND, inputs, upstream_ND)]

    x_ND, masters = case.x_ND.bfloat16(), (case.gate_up_EGD.float(), case.down_EDF.float())
    expected = run(x_ND.clone(), *(t.clone() for t in masters), rounded=True)
    for kernels in (True, False):
        with nullcontext() if kernels else cpu.disabled():
            found = run(x_ND.clone(), *(t.clone() for t in masters), rounded=False)
        assert [t.dtype for t in found[2:]] == [torch.float32] * 2
        for one, other in zip(found, expected, strict=True):
            as_bf16 = one.to(torch.bfloat16).to(other.dtype)
            assert (as_bf16 - other).abs().max() <= (0 if kernels else 0.02) * other.abs().max()


@pytest.mark.parametrize("routing", [ROUTINGS["experts without tokens"], ROUTINGS["some choices are -1"]])
def test_gradients_equal_finite_differences(routing: tuple[Tensor, int]) -> None:
    case = Case(*routing, (5, 3))
    order = dispatch(case.ids_NK, case.experts)
    inputs = [t.requires_grad_() for t in (case.x_ND, case.weights_NK, case.gate_up_EGD, case.down_EDF)]
    assert torch.autograd.gradcheck(
        lambda x, weights, gate_up, down: routed_experts(x, order, weights, gate_up, down), inputs
    )


@pytest.mark.parametrize("widths", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_experts_without_tokens_get_zero_gradients(widths: tuple[int, int]) -> None:
    _, _, _, dgate_up_EGD, ddown_EDF = Case(*ROUTINGS["experts without tokens"], widths).run(True, torch.float32)
    for idle in (0, 4, 5):
        assert (dgate_up_EGD[idle] == 0).all() and (ddown_EDF[idle] == 0).all()
    assert all(dgate_up_EGD[busy].abs().max() > 0 for busy in (1, 2, 3))


@pytest.mark.parametrize("widths", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_uninitialised_rows_are_never_read(monkeypatch: pytest.MonkeyPatch, widths: tuple[int, int]) -> None:
    """After the last expert's rows a grouped matmul leaves memory uninitialised."""
    case = Case(*ROUTINGS["padding, and experts without tokens"], widths)
    expected = case.run(False, torch.float32)
    grouped_matmul, spare = experts_module.grouped_matmul, []

    def poisoned(x_RI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
        out_RO = grouped_matmul(x_RI, w_EIO, ends_E).clone()
        spare.append(len(out_RO) - int(ends_E[-1]))
        out_RO[int(ends_E[-1]) :] = float("nan")
        return out_RO

    monkeypatch.setattr(experts_module, "grouped_matmul", poisoned)
    monkeypatch.setattr(experts_module, "_kernels_take", lambda *_: False)
    for found, truth in zip(case.run(True, torch.float32), expected, strict=True):
        assert (found - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert min(spare) > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_padding_is_little_and_leaves_few_heights(loads: list[int]) -> None:
    tokens_per_expert_E = torch.tensor(loads)
    rows_E = padded_loads(tokens_per_expert_E)
    assert (rows_E >= tokens_per_expert_E).all() and (
        rows_E < tokens_per_expert_E + torch.maximum(tokens_per_expert_E // 16, torch.tensor(16))
    ).all()
    assert (rows_E % 16 == 0).all()
    assert len(set(padded_loads(torch.arange(5000)).tolist())) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_with_some_experts_each_add_up_to_all(dtype: torch.dtype) -> None:
    """Expert parallelism: every expert is on one of three ranks, whose results and gradients are summed."""
    case = Case(random_ids(60, 3, 7), 7, ALIGNED)
    whole, parts = case.run(True, dtype), []
    for here in ({0, 3}, {1, 2, 4, 5}, {6}):
        part = Case(without(case.ids_NK, *(set(range(7)) - here)), 7, ALIGNED)
        parts.append(part.run(True, dtype))
        _, _, dweights_NK, *_ = parts[-1]
        assert (dweights_NK[part.ids_NK < 0] == 0).all()
    for every, one in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(every), one, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 6), st.data(), st.integers(0, 2**32 - 1))
def test_dispatch_sorts_pairs_and_loses_none(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    choices = data.draw(st.integers(1, experts))
    ids_NK = without(random_ids(tokens, choices, experts, seed), *data.draw(st.sets(st.integers(0, experts - 1))))
    order = dispatch(ids_NK, experts)
    here_NK = ids_NK >= 0
    assert torch.equal(order.tokens_per_expert_E, ids_NK[here_NK].bincount(minlength=experts))
    assert torch.equal(order.inverse_indices_NK >= 0, here_NK)
    pair_NK = torch.arange(tokens * choices).view_as(ids_NK)
    assert torch.equal(order.sort_indices_R[order.inverse_indices_NK[here_NK]], pair_NK[here_NK])
    # Every pair stands among its expert's rows, in the order of its token; other rows are marked.
    assert (order.sort_indices_R >= 0).sum() == here_NK.sum()
    start = 0
    for expert, end in enumerate(order.ends_E.tolist()):
        pairs = order.sort_indices_R[start:end]
        pairs = pairs[pairs >= 0]
        assert (ids_NK.flatten()[pairs] == expert).all() and (pairs.diff() > 0).all()
        start = end


@pytest.mark.parametrize("frozen", ["gate_up", "down", "both"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_frozen_weights_have_no_gradient_and_change_no_other(frozen: str, kernels: bool) -> None:
    case = Case(*ROUTINGS["experts without tokens"], ALIGNED)
    grads = []
    for trained in ({"gate_up", "down"}, {"gate_up", "down"} - ({"gate_up", "down"} if frozen == "both" else {frozen})):
        x_ND, weights_NK = case.x_ND.float().requires_grad_(), case.weights_NK.float().requires_grad_()
        gate_up_EGD = case.gate_up_EGD.float().requires_grad_("gate_up" in trained)
        down_EDF = case.down_EDF.float().requires_grad_("down" in trained)
        with nullcontext() if kernels else cpu.disabled():
            out_ND = routed_experts(x_ND, dispatch(case.ids_NK, case.experts), weights_NK, gate_up_EGD, down_EDF)
            out_ND.backward(case.upstream_ND.float())
        grads.append([x_ND.grad, weights_NK.grad, gate_up_EGD.grad, down_EDF.grad])
    for every, some in zip(*grads, strict=True):
        assert some is None or torch.equal(every, some)
    assert [g is None for g in grads[1]] == [False, False, frozen != "down", frozen != "gate_up"]
