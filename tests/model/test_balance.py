"""Balancing by hand: the bias update, the sequence-wise loss, and the measure of evenness."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.model.balance import max_violation, sequence_balance_loss, updated_bias
from tests.model.configs import lively_model, random_tokens, tiny


def test_the_bias_rises_where_load_is_low_and_stays_where_it_is_the_mean() -> None:
    bias_E = torch.tensor([0.5, -0.5, 0.0, 5.0])
    moved_E = updated_bias(bias_E, torch.tensor([1, 7, 4, 4]), 0.001)
    assert torch.equal(moved_E, bias_E + torch.tensor([0.001, -0.001, 0.0, 0.0]))
    assert moved_E.dtype == torch.float32
    assert torch.equal(bias_E, torch.tensor([0.5, -0.5, 0.0, 5.0])), "the update is a pure function"


def test_all_layers_are_updated_at_once_each_by_its_own_mean() -> None:
    tokens_per_expert_LE = torch.tensor([[0, 10], [300, 100], [7, 7]])
    moved_LE = updated_bias(torch.zeros(3, 2), tokens_per_expert_LE, 0.5)
    assert moved_LE.tolist() == [[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]]


def test_speed_zero_freezes_the_bias() -> None:
    bias_E = torch.randn(4)
    assert torch.equal(updated_bias(bias_E, torch.tensor([9, 0, 0, 1]), 0.0), bias_E)


def test_loads_beyond_float32_are_compared_exactly() -> None:
    """2^24 + 1 tokens are no float32; one token too many must still count."""
    tokens_per_expert_E = torch.tensor([2**24 + 1, 2**24, 2**24, 2**24 - 1])
    assert updated_bias(torch.zeros(4), tokens_per_expert_E, 1.0).tolist() == [-1.0, 0.0, 0.0, 1.0]


@torch.no_grad()
def test_micro_batches_together_move_the_bias_as_one_batch() -> None:
    config = tiny(num_nextn_predict_layers=1)
    model = lively_model(config, dtype=torch.float64)
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    tokens_BS = random_tokens(config, 8, 9)
    whole_LE = model(tokens_BS, mtp=True).router.tokens_per_expert_LE
    parts = [model(part_BS, mtp=True).router.tokens_per_expert_LE for part_BS in tokens_BS.split(2)]
    assert torch.equal(torch.stack(parts).sum(0), whole_LE)
    biases_LE = torch.stack([router.e_score_correction_bias for router in model.routers()])
    assert biases_LE.shape == whole_LE.shape
    together_LE = updated_bias(biases_LE, torch.stack(parts).sum(0), 0.001)
    assert torch.equal(together_LE, updated_bias(biases_LE, whole_LE, 0.001))
    assert not torch.equal(together_LE, updated_bias(biases_LE, parts[-1], 0.001)), "too even to prove anything"


def test_max_violation_by_hand() -> None:
    tokens_per_expert_LE = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2]])
    assert max_violation(tokens_per_expert_LE).tolist() == [0.0, 3.0, 0.5]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(2, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_sequence_loss_is_the_formula(batch: int, length: int, experts: int, taken: int, seed: int) -> None:
    taken = min(taken, experts)
    generator = torch.Generator().manual_seed(seed)
    scores_BSE = torch.rand(batch, length, experts, generator=generator, dtype=torch.float64)
    expected = 0.0
    for sequence in scores_BSE.tolist():
        chosen = [sorted(range(experts), key=lambda e, s=s: -s[e])[:taken] for s in sequence]
        for e in range(experts):
            f = experts / (taken * length) * sum(e in ids for ids in chosen)
            p = sum(s[e] / sum(s) for s in sequence) / length
            expected += f * p / batch
    assert sequence_balance_loss(scores_BSE, taken).item() == pytest.approx(expected, rel=1e-10)


def test_the_sequence_loss_is_one_when_even_and_grows_with_concentration() -> None:
    even_BSE = torch.full((2, 6, 3), 0.4)
    assert sequence_balance_loss(even_BSE, 1).item() == pytest.approx(1.0)
    skewed_BSE = torch.tensor([0.9, 0.1, 0.1]).expand(2, 6, 3)
    assert sequence_balance_loss(skewed_BSE, 1).item() == pytest.approx(3 * 0.9 / 1.1)


def test_the_sequence_loss_is_computed_per_sequence() -> None:
    """Two sequences, each on its own expert: even as a batch, as uneven as can be per sequence."""
    scores_BSE = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4])
    assert sequence_balance_loss(scores_BSE, 1).item() == pytest.approx(2.0)


def test_the_sequence_losses_gradient_flows_through_the_probabilities_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    scores_BSE = torch.rand(2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    (found_BSE,) = torch.autograd.grad(sequence_balance_loss(scores_BSE, 2), scores_BSE)

    chosen_BSE = torch.zeros(2, 5, 4, dtype=torch.float64).scatter(2, scores_BSE.topk(2).indices, 1.0)
    f_BE = chosen_BSE.sum(1) * 4 / (2 * 5)
    total_BS1 = scores_BSE.detach().sum(-1, keepdim=True)
    # d/ds_j Σ_i f_i s_i/Σs = (f_j − Σ_i f_i p_i) / Σs
    p_BSE = scores_BSE.detach() / total_BS1
    mean_f_BS1 = (f_BE[:, None] * p_BSE).sum(-1, keepdim=True)
    expected_BSE = (f_BE[:, None] - mean_f_BS1) / total_BS1 / (2 * 5)
    assert torch.allclose(found_BSE, expected_BSE, rtol=0, atol=1e-12)
