"""Packed samples: what is a target of which head, and that samples do not see each other."""

import pytest
import torch

from fathom.config import ConfigError
from fathom.model.transformer import Model
from fathom.ops.loss import IGNORE
from fathom.posttrain.loss import PosttrainLoss, TargetFacts
from fathom.posttrain.pack import Sample, Targets, micro_batches, pack
from tests.model.configs import lively_model, tiny


def _sample(seed: int, length: int, prompt: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(32, (length,), generator=generator)
    weights_T = torch.zeros(length)
    weights_T[prompt:] = 1
    return Sample(tokens_T, weights_T, {"place": torch.arange(length).float()})


def test_targets_are_the_tokens_with_a_weight_each_predicted_by_the_token_before_it() -> None:
    packed = pack([_sample(0, 5, 2), _sample(1, 4, 3)], modules=1)
    assert packed.batch.cu_seqlens is not None and packed.batch.cu_seqlens.tolist() == [0, 5, 9]
    assert packed.index_X.tolist() == [1, 2, 3, 7]
    assert packed.targets.sample_X.tolist() == [0, 0, 0, 1]
    assert packed.targets.values["place"].tolist() == [2, 3, 4, 3]
    tokens = [*_sample(0, 5, 2).tokens_T.tolist(), *_sample(1, 4, 3).tokens_T.tolist()]
    main, mtp = packed.batch.targets_HBS[:, 0].tolist()
    assert main == [IGNORE, *tokens[2:5], IGNORE, IGNORE, IGNORE, tokens[8], IGNORE]
    assert mtp == [*tokens[2:5], IGNORE, IGNORE, IGNORE, tokens[8], IGNORE, IGNORE]


def test_micro_batches_keep_the_order_and_the_limit() -> None:
    samples = [_sample(seed, length, 1) for seed, length in enumerate([5, 3, 9, 1, 7, 2])]
    parts = list(micro_batches(samples, 9))
    assert [sample for part in parts for sample in part] == samples
    assert [sum(map(len, part)) for part in parts] == [8, 9, 8, 2]
    with pytest.raises(ConfigError, match="micro_batch_tokens is 8; it must be at least 9, a sample's tokens"):
        list(micro_batches(samples, 8))


def test_samples_without_any_trained_token_are_an_error() -> None:
    with pytest.raises(ValueError, match="no token of these samples is to be trained"):
        pack([_sample(0, 5, 5)], modules=0)


def _gradients(
    model: Model, groups: list[list[Sample]], detach_mtp: bool = False, mtp_loss_weight: float = 0.3
) -> dict[str, torch.Tensor]:
    """Of the sum over groups of samples, each packed on its own."""
    loss = PosttrainLoss(model, torch.float32, detach_mtp=detach_mtp)
    weights_H = torch.stack([pack(group, 1).batch.target_weights() for group in groups]).sum(0)
    model.zero_grad()
    for group in groups:
        packed = pack(group, 1)

        def objective(targets: Targets, facts: TargetFacts) -> torch.Tensor:
            return targets.weights_X * targets.values["place"] / weights_H[0]

        loss(packed, objective, weights_H, mtp_loss_weight, 1.0).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_samples_have_the_gradients_of_unpacked_ones() -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    samples = [_sample(seed, length, 2) for seed, length in enumerate([7, 4, 9])]
    together, apart = _gradients(model, [samples]), _gradients(model, [[sample] for sample in samples])
    assert together.keys() == apart.keys()
    for name, found in together.items():
        torch.testing.assert_close(found, apart[name], rtol=1e-5, atol=1e-6 * float(apart[name].abs().max()) + 1e-9)


def test_a_detached_module_trains_alone() -> None:
    model = lively_model(tiny(num_nextn_predict_layers=1))
    samples = [_sample(seed, length, 2) for seed, length in enumerate([7, 4, 9])]
    attached, detached = _gradients(model, [samples]), _gradients(model, [samples], detach_mtp=True)
    without = _gradients(model, [samples], mtp_loss_weight=0.0)
    for name, found in detached.items():
        expected = attached if name.startswith("mtp.") else without
        assert torch.equal(found, expected[name]), name
    assert not torch.equal(attached["embed_tokens.weight"], without["embed_tokens.weight"])
