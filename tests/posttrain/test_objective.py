"""The formulas against exact gradients, on a vocabulary small enough to enumerate, and against autograd.

The policy is tabular: logits of a first token and, after each first token, of a second. V vocabulary, N groups of G.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fathom.posttrain.objective import advantages, cispo, dpo, grpo, gspo, k3, overlong_penalty, unbiased_kl
from fathom.posttrain.pack import Targets

V, N, G = 4, 20_000, 4


def _tables(seed: int) -> list[Tensor]:
    """Logits of the first token (V) and of the second after each first (V, V)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(V, generator=generator, dtype=torch.float64), torch.randn(V, V, generator=generator).double()]


def _draw(tables: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first_S = tables[0].softmax(0).multinomial(N * G, replacement=True, generator=generator)
    second_S = tables[1].softmax(1)[first_S].multinomial(1, generator=generator)[:, 0]
    return first_S, second_S


def _logprobs(tables: list[Tensor], first_S: Tensor, second_S: Tensor) -> Tensor:
    """Of both tokens (2·S), a sample's first and second one after the other."""
    first_logprobs_S = tables[0].log_softmax(0)[first_S]
    return torch.stack((first_logprobs_S, tables[1].log_softmax(1)[first_S, second_S]), dim=1).flatten()


def _group_gradients(tables: list[Tensor], first_S: Tensor, second_S: Tensor, c_X: Tensor) -> Tensor:
    """Σ c·∇log p over the samples of each group, divided by G: (N, V + V·V)."""
    c_S2 = c_X.view(-1, 2)
    onehot = torch.eye(V, dtype=torch.float64)
    d_first_SV = c_S2[:, :1] * (onehot[first_S] - tables[0].softmax(0))
    d_second_SV = c_S2[:, 1:] * (onehot[second_S] - tables[1].softmax(1)[first_S])
    d_second_SVV = onehot[first_S][:, :, None] * d_second_SV[:, None]
    return torch.cat((d_first_SV, d_second_SVV.flatten(1)), dim=1).view(N, G, -1).mean(1)


def _in_standard_errors(found_ND: Tensor, exact_D: Tensor) -> float:
    """How far the mean is from what is exact, at the worst coordinate."""
    error_D = found_ND.std(0) / math.sqrt(len(found_ND))
    return float(((found_ND.mean(0) - exact_D).abs() / error_D).max())


def _exact(tables: list[Tensor], expectation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The gradient (V + V·V) of an expectation, by autograd through both tables."""
    leaves = [table.clone().requires_grad_() for table in tables]
    return torch.cat([g.flatten() for g in torch.autograd.grad(expectation(*leaves), leaves)])


def _targets(samples: int) -> Targets:
    ones_X = torch.ones(2 * samples, dtype=torch.float64)
    return Targets(ones_X, torch.arange(samples).repeat_interleave(2), {}, samples)


@pytest.mark.parametrize("variant", ["cispo", "grpo", "gspo"])
@pytest.mark.parametrize("seed", [1, 2])
def test_on_policy_every_variant_is_the_policy_gradient(variant: str, seed: int) -> None:
    tables = _tables(seed)
    rewards_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).round(decimals=1)
    first_S, second_S = _draw(tables, seed)
    rewards_NG = rewards_VV[first_S, second_S].view(N, G)
    own = [advantages(group) or [0.0] * G for group in rewards_NG.tolist()]
    advantages_X = torch.tensor(own, dtype=torch.float64).flatten().repeat_interleave(2)
    logprobs_X = _logprobs(tables, first_S, second_S)
    weights = {
        "cispo": lambda: cispo(logprobs_X, logprobs_X, advantages_X, 5.0),
        "grpo": lambda: grpo(logprobs_X, logprobs_X, advantages_X, 0.2, 0.28),
        "gspo": lambda: gspo(logprobs_X, logprobs_X, advantages_X, _targets(N * G), 3e-4, 4e-4),
    }[variant]()
    assert not weights.clipped_X.any()
    exact_D = _exact(tables, lambda a, b: (a.softmax(0)[:, None] * b.softmax(1) * rewards_VV).sum())
    # An answer's own reward is part of the mean that is taken off it.
    found_ND = _group_gradients(tables, first_S, second_S, weights.c_X)
    assert _in_standard_errors(found_ND, exact_D * (G - 1) / G) < 4
    assert _in_standard_errors(found_ND, exact_D * 0.9) > 4, "the test would not notice a wrong scale"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_unbiased_kl_is_exact_off_policy_where_plain_k3_is_not(seed: int) -> None:
    """Over prefixes as the old policy gives them."""
    tables, old, reference = (_tables(10 * seed + each) for each in range(3))
    first_S, second_S = _draw(old, seed)
    now_X, old_X, reference_X = (_logprobs(each, first_S, second_S) for each in (tables, old, reference))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        first = (a.softmax(0) * (a.log_softmax(0) - reference[0].log_softmax(0))).sum()
        second_V = (b.softmax(1) * (b.log_softmax(1) - reference[1].log_softmax(1))).sum(1)
        return first + (old[0].softmax(0) * second_V).sum()

    exact_D = _exact(tables, kl)
    unbiased_ND = _group_gradients(tables, first_S, second_S, -unbiased_kl(now_X, old_X, reference_X))
    assert _in_standard_errors(unbiased_ND, exact_D) < 4
    plain_ND = _group_gradients(tables, first_S, second_S, 1 - (reference_X - now_X).exp())
    assert _in_standard_errors(plain_ND, exact_D) > 10


def test_weights_are_the_derivatives_of_the_surrogates() -> None:
    """Autograd of the papers' objectives, off-policy, where some ratios are clipped."""
    generator = torch.Generator().manual_seed(0)
    logprobs_X, old_X, advantages_S = (torch.randn(size, generator=generator).double() for size in (40, 40, 20))
    logprobs_X, old_X = -logprobs_X.abs(), -old_X.abs()
    advantages_X, leaf_X = advantages_S.repeat_interleave(2), logprobs_X.clone().requires_grad_()
    ratio_X = (leaf_X - old_X).exp()
    surrogate = torch.minimum(ratio_X * advantages_X, ratio_X.clamp(0.8, 1.28) * advantages_X).sum()
    found = grpo(logprobs_X, old_X, advantages_X, 0.2, 0.28)
    torch.testing.assert_close(found.c_X, torch.autograd.grad(surrogate, leaf_X)[0])
    assert 0 < int(found.clipped_X.sum()) < 40

    length = 2
    ratio_S = ((leaf_X - old_X).view(20, length).mean(1)).exp()
    sequence = length * torch.minimum(ratio_S * advantages_S, ratio_S.clamp(0.8, 1.28) * advantages_S).sum()
    found = gspo(logprobs_X, old_X, advantages_X, _targets(20), 0.2, 0.28)
    torch.testing.assert_close(found.c_X, torch.autograd.grad(sequence, leaf_X)[0])
    assert 0 < int(found.clipped_X.sum()) < 40

    ratio_X = (leaf_X - old_X).exp().detach().clamp_max(1.5)
    found = cispo(logprobs_X, old_X, advantages_X, 1.5)
    torch.testing.assert_close(found.c_X, torch.autograd.grad((ratio_X * advantages_X * leaf_X).sum(), leaf_X)[0])
    assert 0 < int(found.clipped_X.sum()) < 40


def test_dpo_weighs_a_pair_by_its_losss_derivative() -> None:
    margins_P = torch.linspace(-30, 30, 13, dtype=torch.float64, requires_grad=True)
    loss = -torch.nn.functional.logsigmoid(0.3 * margins_P).sum()
    torch.testing.assert_close(dpo(margins_P.detach(), 0.3), -torch.autograd.grad(loss, margins_P)[0])


def test_k3_averages_to_the_kl() -> None:
    p, q = (table[0].softmax(0) for table in (_tables(1), _tables(2)))
    torch.testing.assert_close((p * k3(p.log(), q.log())).sum(), (p * (p / q).log()).sum())


def test_equal_rewards_teach_nothing() -> None:
    assert advantages([0.0, 0.0, 0.0]) is None and advantages([1.0, 1.0]) is None
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]


def test_the_overlong_penalty_grows_over_the_cushion() -> None:
    assert [overlong_penalty(length, 100, 20) for length in (1, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert overlong_penalty(100, 100, 0) == 0
