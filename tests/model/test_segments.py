"""Segments packed into rows: isolated exactly, equal to the same segments run alone, in outputs and gradients."""

from contextlib import nullcontext
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fathom.model.balance import sequence_balance_loss
from fathom.model.config import ModelConfig
from fathom.model.outputs import HiddenStates
from fathom.model.segments import segment_positions, with_successor
from fathom.model.transformer import Model
from fathom.ops import cpu
from tests.model.configs import (
    boundaries,
    lively_model,
    model_configs,
    packed_rows,
    random_tokens,
    relative_error,
    tiny,
)

seeds = st.integers(0, 2**32 - 1)
LENGTHS = [[5, 1, 6], [3, 9]]
"""Of the segments of two rows of 12 tokens."""


def loss_of(model: Model, hidden: HiddenStates, tokens_BS: Tensor, lengths: list[int], balance: float) -> Tensor:
    """Summed cross-entropy of the targets inside each segment, MTP's too, plus a multiple of the balance loss."""
    total = balance * hidden.router.balance_loss
    tokens_N, start = tokens_BS.flatten(), 0
    for length in lengths:
        for k, h_BSD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD)):
            h_ND, count = h_BSD.flatten(0, 1)[start : start + length], length - k - 1
            if count > 0:
                targets_N = tokens_N[start + k + 1 : start + length]
                total = total + F.cross_entropy(model.logits(h_ND[:count]), targets_N, reduction="sum")
        start += length
    return total


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)]


@settings(max_examples=25, deadline=None)
@given(model_configs(modules=(0, 2)), packed_rows(), seeds)
def test_packed_segments_equal_each_segment_alone(config: ModelConfig, rows: list[list[int]], seed: int) -> None:
    """Hidden states, the modules' too, expert loads, balance loss and gradients."""
    modules = config.num_nextn_predict_layers
    lengths = [length for row in rows for length in row]
    model = lively_model(config, seed, dtype=torch.float64)
    tokens_BS = random_tokens(config, len(rows), sum(rows[0]), seed)
    runs = max(lengths) > modules
    packed = model.forward_hidden(tokens_BS, cu_seqlens=boundaries(rows), mtp=runs)
    alone = []
    for tokens_N in tokens_BS.flatten().split(lengths):
        # A module has nothing to run over in a segment that is no longer than it reaches ahead.
        alone.append(model.forward_hidden(tokens_N[None], mtp=runs and len(tokens_N) > modules))
    for found, expected in zip(packed.h_BSD.flatten(0, 1).split(lengths), alone, strict=True):
        assert relative_error(found.detach(), expected.h_BSD[0].detach()) <= 1e-10
    for k, h_BSD in enumerate(packed.mtp_h_BSD, start=1):
        for found, expected in zip(h_BSD.flatten(0, 1).split(lengths), alone, strict=True):
            count = max(len(found) - k, 0)
            assert (found[count:] == 0).all()
            if expected.mtp_h_BSD:
                assert relative_error(found[:count].detach(), expected.mtp_h_BSD[k - 1][0].detach()) <= 1e-10
    layers = config.num_moe_layers
    for layer in range(layers):
        each = [one.router.layers[layer] for one in alone]
        total_E = torch.stack([one.tokens_per_expert_E for one in each]).sum(0)
        assert torch.equal(packed.router.tokens_per_expert_LE[layer], total_E)
        balance = torch.stack([one.balance_loss for one in each if one.balance_loss is not None]).mean()
        assert torch.isclose(packed.router.layers[layer].balance_loss, balance, rtol=1e-10, atol=0)

    if all(length > modules + 1 for length in lengths):
        found_loss = loss_of(model, packed, tokens_BS, lengths, 0.3)
        losses = [
            loss_of(model, one, tokens_N[None], [len(tokens_N)], 0.3 / len(lengths))
            for one, tokens_N in zip(alone, tokens_BS.flatten().split(lengths), strict=True)
        ]
        expected_loss = torch.stack(losses).sum()
        assert torch.isclose(found_loss, expected_loss, rtol=1e-10, atol=1e-12)
        for found, expected in zip(gradients(model, found_loss), gradients(model, expected_loss), strict=True):
            assert (found - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_both_paths_and_types_equal_each_segment_alone(kernels: bool, dtype: torch.dtype) -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, tokens_BS = lively_model(config), random_tokens(config, 2, 12)
    with nullcontext() if kernels else cpu.disabled():
        packed = model.forward_hidden(tokens_BS, cu_seqlens=boundaries(LENGTHS), mtp=True, compute_dtype=dtype)
        start = 0
        for length in (length for row in LENGTHS for length in row):
            own_BS = tokens_BS.flatten()[start : start + length][None]
            alone = model.forward_hidden(own_BS, mtp=length > 1, compute_dtype=dtype)
            for k, (found_BSD, expected_BSD) in enumerate(
                zip((packed.h_BSD, *packed.mtp_h_BSD), (alone.h_BSD, *alone.mtp_h_BSD), strict=False)
            ):
                found_ND = found_BSD.flatten(0, 1)[start : start + length - k]
                bound = 1e-6 if dtype == torch.float32 else 2e-2
                assert relative_error(found_ND.float(), expected_BSD[0].float()) <= bound
            start += length


EVERY_EXPERT = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}
"""Each token takes all experts. Else another segment's choices change how many tokens an expert has, and with the
number of rows a float32 GEMM may round otherwise; that is no leak, and bounded by the second test."""


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_editing_a_segment_changes_no_other_by_a_bit(kernels: bool, dtype: torch.dtype) -> None:
    with nullcontext() if kernels else cpu.disabled():
        assert largest_change_of_others(tiny(num_nextn_predict_layers=2, **EVERY_EXPERT), dtype) == 0


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_editing_a_segment_changes_others_by_rounding_at_most_where_experts_differ(kernels: bool) -> None:
    with nullcontext() if kernels else cpu.disabled():
        assert largest_change_of_others(tiny(num_nextn_predict_layers=2), torch.float32) <= 1e-6


@torch.no_grad()
def largest_change_of_others(config: ModelConfig, dtype: torch.dtype) -> float:
    """Relative to the largest value, over all segments edited in turn, of all others' hidden states."""
    model, tokens_BS, ends = lively_model(config), random_tokens(config, 2, 12), boundaries(LENGTHS)
    before = model.forward_hidden(tokens_BS, cu_seqlens=ends, mtp=True, compute_dtype=dtype)
    largest = 0.0
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        edited_BS = tokens_BS.clone()
        edited_BS.view(-1)[start:end] = (edited_BS.view(-1)[start:end] + 1) % config.vocab_size
        after = model.forward_hidden(edited_BS, cu_seqlens=ends, mtp=True, compute_dtype=dtype)
        assert not torch.equal(before.h_BSD, after.h_BSD)
        other_N = torch.ones(24, dtype=torch.bool)
        other_N[start:end] = False
        for old_BSD, new_BSD in zip((before.h_BSD, *before.mtp_h_BSD), (after.h_BSD, *after.mtp_h_BSD), strict=True):
            found_ND, expected_ND = (h.flatten(0, 1)[other_N].double() for h in (new_BSD, old_BSD))
            largest = max(largest, relative_error(found_ND, expected_ND))
    return largest


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain torch"])
def test_no_gradient_crosses_a_boundary(kernels: bool) -> None:
    config = tiny(num_nextn_predict_layers=2)
    model, tokens_BS = lively_model(config), random_tokens(config, 2, 12)
    ends = boundaries(LENGTHS)
    # Every token its own id, so that an embedding's gradient is that of one position.
    tokens_BS = torch.arange(24).view(2, 12)
    with nullcontext() if kernels else cpu.disabled():
        hidden = model.forward_hidden(tokens_BS, cu_seqlens=ends, mtp=True)
        own = slice(6, 12)
        total = sum(h_BSD.flatten(0, 1)[own].square().sum() for h_BSD in (hidden.h_BSD, *hidden.mtp_h_BSD))
        (grad_OD,) = torch.autograd.grad(cast(Tensor, total), model.embed_tokens.weight)
    assert (grad_OD[:6] == 0).all() and (grad_OD[12:] == 0).all()
    assert (grad_OD[own] != 0).any(1).all()


def test_activation_checkpointing_keeps_segments() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model, tokens_BS = lively_model(config), random_tokens(config, 2, 12)
    lengths = [length for row in LENGTHS for length in row]
    found = []
    for recompute in (False, True):
        hidden = model.forward_hidden(
            tokens_BS, cu_seqlens=boundaries(LENGTHS), mtp=True, activation_checkpointing=recompute
        )
        found.append([hidden.h_BSD, *gradients(model, loss_of(model, hidden, tokens_BS, lengths, 0.1))])
    assert all(map(torch.equal, *found))


@torch.no_grad()
def test_one_segment_a_row_is_what_no_segments_are() -> None:
    config = tiny()
    model, tokens_BS = lively_model(config, dtype=torch.float64), random_tokens(config, 3, 7)
    plain = model.forward_hidden(tokens_BS)
    packed = model.forward_hidden(tokens_BS, cu_seqlens=torch.tensor([0, 7, 14, 21], dtype=torch.int32))
    assert relative_error(packed.h_BSD, plain.h_BSD) <= 1e-12
    assert torch.isclose(packed.router.balance_loss, plain.router.balance_loss, rtol=1e-12, atol=0)


@settings(max_examples=15, deadline=None)
@given(model_configs(modules=(0, 2)), packed_rows(), st.integers(0, 50), seeds)
@torch.no_grad()
def test_positions_are_relative_and_restart_unless_given(
    config: ModelConfig, rows: list[list[int]], offset: int, seed: int
) -> None:
    model, tokens_BS = lively_model(config, seed, dtype=torch.float64), random_tokens(config, len(rows), sum(rows[0]))
    ends, mtp = boundaries(rows), max(map(max, rows)) > config.num_nextn_predict_layers
    restarting = model.forward_hidden(tokens_BS, cu_seqlens=ends, mtp=mtp)
    own_BS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    assert torch.equal(segment_positions(ends, own_BS.numel()), own_BS.flatten())
    given_here = model.forward_hidden(tokens_BS, own_BS, ends, mtp=mtp)
    for found, expected in zip(
        (given_here.h_BSD, *given_here.mtp_h_BSD), (restarting.h_BSD, *restarting.mtp_h_BSD), strict=True
    ):
        assert torch.equal(found, expected)
    shifted = model.forward_hidden(tokens_BS, own_BS + offset, ends, mtp=mtp)
    # Angles are float32, so a shift costs their rounding.
    assert relative_error(shifted.h_BSD, restarting.h_BSD) <= 1e-4


@torch.no_grad()
def test_given_positions_turn_queries_and_keys() -> None:
    """With every other position, distances double: as with every frequency doubled."""
    config = tiny(qk_rope_head_dim=2, num_nextn_predict_layers=1)  # a single frequency: 1
    model, tokens_BS = lively_model(config, dtype=torch.float64), random_tokens(config, 2, 7)
    positions_BS = torch.arange(7).expand(2, -1)
    plain = model.forward_hidden(tokens_BS, mtp=True)
    given_here = model.forward_hidden(tokens_BS, positions_BS, mtp=True)
    assert torch.equal(given_here.h_BSD, plain.h_BSD)
    assert torch.equal(given_here.mtp_h_BSD[0], plain.mtp_h_BSD[0])
    spread = model.forward_hidden(tokens_BS, 2 * positions_BS, mtp=True)
    assert relative_error(spread.h_BSD[:, 1:], plain.h_BSD[:, 1:]) > 1e-3
    assert relative_error(spread.mtp_h_BSD[0][:, 1:], plain.mtp_h_BSD[0][:, 1:]) > 1e-3


@settings(max_examples=50, deadline=None)
@given(packed_rows(), st.integers(1, 3))
def test_successors_by_definition(rows: list[list[int]], ahead: int) -> None:
    lengths = [length for row in rows for length in row]
    kept, left, start = [], [], 0
    for length in lengths:
        own = [start + i for i in range(length) if i + ahead < length]
        kept += own
        left += [len(own)] if own else []
        start += length
    index_X, ends = with_successor(boundaries(rows), start, ahead)
    assert index_X.tolist() == kept and ends.dtype == torch.int32
    assert ends.tolist() == torch.tensor([0, *left]).cumsum(0).tolist()


@settings(max_examples=30, deadline=None)
@given(packed_rows(), st.integers(2, 6), st.integers(1, 6), seeds)
def test_the_balance_loss_of_segments_is_the_mean_of_theirs(
    rows: list[list[int]], experts: int, taken: int, seed: int
) -> None:
    taken = min(taken, experts)
    generator = torch.Generator().manual_seed(seed)
    scores_BSE = torch.rand(len(rows), sum(rows[0]), experts, generator=generator, dtype=torch.float64).requires_grad_()
    found = sequence_balance_loss(scores_BSE, taken, boundaries(rows))
    lengths = [length for row in rows for length in row]
    parts = [sequence_balance_loss(part_SE[None], taken) for part_SE in scores_BSE.flatten(0, 1).split(lengths)]
    expected = torch.stack(parts).mean()
    assert torch.isclose(found, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, scores_BSE)[0] for loss in (found, expected)]
    assert torch.allclose(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cu_seqlens", "said"),
    [
        (torch.tensor([0, 4, 8]), "torch.int64 of shape .*it must be int32"),
        (torch.tensor([[0, 4, 8]], dtype=torch.int32), "it must be int32 of shape"),
        (torch.tensor([0, 4, 4, 8], dtype=torch.int32), "increase strictly from 0 to the 8 tokens"),
        (torch.tensor([0, 4], dtype=torch.int32), "increase strictly from 0 to the 8 tokens"),
        (torch.tensor([1, 4, 8], dtype=torch.int32), "increase strictly from 0"),
        (torch.tensor([0, 3, 8], dtype=torch.int32), "must contain 4, the end of a row of 4 tokens"),
        (torch.tensor([], dtype=torch.int32), "increase strictly"),
    ],
    ids=["int64", "two dimensions", "an empty segment", "too short", "not from 0", "across rows", "empty"],
)
def test_wrong_boundaries_are_named(cu_seqlens: Tensor, said: str) -> None:
    model = Model(tiny())
    with pytest.raises(ValueError, match=said):
        model.forward_hidden(torch.zeros(2, 4, dtype=torch.int64), cu_seqlens=cu_seqlens)


def test_other_wrong_inputs_are_named() -> None:
    model, tokens_BS = Model(tiny(num_nextn_predict_layers=2)), torch.zeros(2, 4, dtype=torch.int64)
    ends = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="lookahead_BM is given with cu_seqlens"):
        model.forward_hidden(tokens_BS, cu_seqlens=ends, mtp=True, lookahead_BM=tokens_BS[:, :2])
    with pytest.raises(ValueError, match="segments of at most 2 tokens are too short for MTP module 2"):
        model.forward_hidden(tokens_BS, cu_seqlens=torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32), mtp=True)
    with pytest.raises(ValueError, match=r"positions_BS is torch.int64 of shape \(4,\).*shape \(2, 4\)"):
        model.forward_hidden(tokens_BS, torch.arange(4))
    with pytest.raises(ValueError, match=r"positions_BS is torch.float32"):
        model.forward_hidden(tokens_BS, torch.zeros(2, 4))
