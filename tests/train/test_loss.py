"""The pretraining loss against its definition over whole logits; weights of targets; any split into micro-batches."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fathom.data.batch import Batch, document_ids, next_token_batch, packed_batch
from fathom.model.transformer import Model
from fathom.ops.loss import IGNORE
from fathom.train.loss import PretrainLoss
from tests.model.configs import lively_model, random_tokens, tiny

EOS_ID, MODULES, LENGTH = 1, 2, 9
CONFIG = tiny(vocab_size=23, num_nextn_predict_layers=MODULES)
ALPHA, MTP_WEIGHT = 0.01, 0.3


def make_batch(rows: int, weighted: bool, seed: int = 0) -> Batch:
    tokens_BW = random_tokens(CONFIG, rows, LENGTH + 1 + MODULES, seed)
    batch = next_token_batch(tokens_BW, MODULES, document_ids(tokens_BW, EOS_ID))
    if not weighted:
        return batch
    draw = torch.Generator().manual_seed(seed)
    return replace(batch, weights_HBS=torch.rand(batch.targets_HBS.shape, generator=draw, dtype=torch.float64))


def by_definition(model: Model, batch: Batch) -> Tensor:
    """One target at a time, over whole logits."""
    hidden = model.forward_hidden(batch.inputs, mtp=True, lookahead_BM=batch.lookahead)
    means = []
    for k, h_BSD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD)):
        log_p_BSO = model.logits(h_BSD).log_softmax(-1)
        total, weights = torch.zeros((), dtype=torch.float64), 0.0
        for b, i in torch.cartesian_prod(torch.arange(len(batch.inputs)), torch.arange(LENGTH)).tolist():
            target = int(batch.targets_HBS[k, b, i])
            if target != IGNORE:
                weight = 1.0 if batch.weights_HBS is None else float(batch.weights_HBS[k, b, i])
                total, weights = total - weight * log_p_BSO[b, i, target], weights + weight
        means.append(total / weights)
    return means[0] + MTP_WEIGHT * (means[1] + means[2]) / 2 + ALPHA * hidden.router.balance_loss


def gradients(model: Model, losses: Sequence[Tensor]) -> list[Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("weighted", [False, True], ids=["all one", "weighted"])
def test_loss_and_gradients_are_those_of_the_definition(weighted: bool) -> None:
    model, batch = lively_model(CONFIG, dtype=torch.float64).train(), make_batch(3, weighted)
    pretrain_loss = PretrainLoss(model, ALPHA, torch.float64)
    output, expected = pretrain_loss(batch, batch.target_weights(), MTP_WEIGHT, 1.0), by_definition(model, batch)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for found, wanted in zip(gradients(model, [output.total]), gradients(model, [expected]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True], ids=["all one", "weighted"])
def test_micro_batches_add_up_to_the_batch(weighted: bool) -> None:
    """Their targets' weights differ, so a mean of means would not do."""
    model, batch = lively_model(CONFIG, dtype=torch.float64).train(), make_batch(3, weighted)
    pretrain_loss = PretrainLoss(model, ALPHA, torch.float64)
    weights_H = batch.target_weights()
    parts = [
        Batch(batch.tokens_BT[rows], batch.targets_HBS[:, rows], w if (w := batch.weights_HBS) is None else w[:, rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert torch.allclose(torch.stack([part.target_weights() for part in parts]).sum(0), weights_H, rtol=1e-14)
    whole = gradients(model, [pretrain_loss(batch, weights_H, MTP_WEIGHT, 1.0).total])
    outputs = [pretrain_loss(part, weights_H, MTP_WEIGHT, len(part.inputs) / 3) for part in parts]
    for found, wanted in zip(gradients(model, [output.total for output in outputs]), whole, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_weights_of_one_are_no_weights() -> None:
    model, batch = lively_model(CONFIG).train(), make_batch(3, weighted=False)
    ones = replace(batch, weights_HBS=torch.ones(batch.targets_HBS.shape))
    assert torch.equal(ones.target_weights(), batch.target_weights())
    assert batch.target_weights().tolist() == (batch.targets_HBS != IGNORE).sum((1, 2)).tolist()
    pretrain_loss = PretrainLoss(model, ALPHA, torch.float32)
    plain, weighted = (pretrain_loss(each, each.target_weights(), MTP_WEIGHT, 1.0).total for each in (batch, ones))
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_weight_of_zero_is_no_target() -> None:
    model, batch = lively_model(CONFIG, dtype=torch.float64).train(), make_batch(3, weighted=False)
    dropped_HBS = torch.rand(batch.targets_HBS.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    zeros = replace(batch, weights_HBS=(~dropped_HBS).double())
    ignored = replace(batch, targets_HBS=batch.targets_HBS.masked_fill(dropped_HBS, IGNORE))
    assert torch.equal(zeros.target_weights(), ignored.target_weights())
    pretrain_loss = PretrainLoss(model, ALPHA, torch.float64)
    found, wanted = (pretrain_loss(each, each.target_weights(), MTP_WEIGHT, 1.0).total for each in (zeros, ignored))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_a_step_without_a_target_has_a_loss_of_zero() -> None:
    """As where every module's targets cross into another document."""
    model, batch = lively_model(CONFIG).train(), make_batch(2, weighted=False)
    none = replace(batch, targets_HBS=torch.full_like(batch.targets_HBS, IGNORE))
    output = PretrainLoss(model, 0.0, torch.float32)(none, none.target_weights(), MTP_WEIGHT, 1.0)
    assert output.total.item() == 0


def alone(model: Model, tokens_S: Tensor) -> list[Tensor]:
    """Each head's summed loss over a segment that is a sequence of its own."""
    hidden = model.forward_hidden(tokens_S[None], mtp=True)
    sums = []
    for k, h_1SD in enumerate((hidden.h_BSD, *hidden.mtp_h_BSD)):
        targets_S = tokens_S[k + 1 :]
        log_p_SO = model.logits(h_1SD[0, : len(targets_S)]).log_softmax(-1)
        sums.append(-log_p_SO.gather(1, targets_S[:, None]).sum())
    return sums


def test_packed_segments_have_the_losses_of_each_alone() -> None:
    model = lively_model(CONFIG, dtype=torch.float64).train()
    tokens_BS = random_tokens(CONFIG, 2, LENGTH, seed=4)
    ends = [0, 5, 9, 15, 18]
    batch = packed_batch(tokens_BS, torch.tensor(ends, dtype=torch.int32), MODULES)
    segments = [tokens_BS.flatten()[a:b] for a, b in itertools.pairwise(ends)]
    assert batch.target_weights().tolist() == [sum(len(s) - k - 1 for s in segments) for k in range(1 + MODULES)]
    output = PretrainLoss(model, 0.0, torch.float64)(batch, batch.target_weights(), MTP_WEIGHT, 1.0)
    expected_H = torch.stack([torch.stack(alone(model, segment)) for segment in segments]).sum(0)
    torch.testing.assert_close(output.sums_H, expected_H.detach(), rtol=1e-12, atol=0)
    means_H = expected_H / batch.target_weights()
    wanted = gradients(model, [means_H[0] + MTP_WEIGHT * means_H[1:].mean()])
    for found, gradient in zip(gradients(model, [output.total]), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_positions_reach_the_model() -> None:
    """Rotary positions are relative: shifted ones change nothing, stretched ones do."""
    model, batch = lively_model(CONFIG, dtype=torch.float64).train(), make_batch(2, weighted=False)
    pretrain_loss, positions_BS = PretrainLoss(model, ALPHA, torch.float64), torch.arange(LENGTH).expand(2, -1)
    plain, shifted, stretched = (
        pretrain_loss(replace(batch, positions_BS=given), batch.target_weights(), MTP_WEIGHT, 1.0).total.item()
        for given in (None, positions_BS + 7, 3 * positions_BS)
    )
    assert shifted == pytest.approx(plain, rel=1e-9)
    assert abs(stretched - plain) > 1e-6
