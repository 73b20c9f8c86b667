"""Matrices kept in two widths: the same step as narrowing them wherever they are used."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.model.transformer import Model
from fathom.ops import cpu
from fathom.train.bf16_weights import Bf16Weights
from fathom.train.loss import PretrainLoss
from fathom.train.pretrain import micro_batches, pretrain_step
from fathom.train.run import Run
from fathom.train.setup import build_state, open_rows, resolve, tokenize_once


@pytest.fixture
def prepared(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> TokenizedCorpus:
    return tokenize_once(tiny_run, tmp_path / "data", one_rank)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_gradients_are_those_of_narrowing_at_every_use(
    tied: bool, times: int, tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks
) -> None:
    run = _narrow_run(tiny_run, prepared, one_rank, tied)
    plain, copied = (build_state(run, one_rank).model for _ in range(2))
    rows = open_rows(prepared, run, "train")
    batches = [batch for i in range(times) for batch in micro_batches(rows, 4 * i, 4, run, one_rank)]
    assert len(batches) == times
    weights_H = torch.stack([batch.target_weights() for batch in batches]).sum(0)
    with cpu.disabled():  # the kernels add gradients up in float32 where plain torch rounds them
        copy = Bf16Weights(copied)
        for computing in (plain, copy.model):
            loss = PretrainLoss(computing, run.train.seq_balance_loss_weight, torch.bfloat16)
            for batch in batches:
                loss(batch, weights_H, 0.3, 0.5).total.backward()
        copy.collect()
    for (name, expected), (_, found) in zip(plain.named_parameters(), copied.named_parameters(), strict=True):
        assert found.grad is not None and found.grad.dtype == torch.float32
        # The head's alone is rounded once more, to bfloat16; where it is the embedding's, too, each of the two is.
        headed = name in ("lm_head.weight", "embed_tokens.weight" if tied else "")
        tolerance = 2 ** (-7 if tied else -8) * float(expected.grad.abs().max()) if headed else 0
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=tolerance, msg=name)


def test_a_step_refreshes_the_copies(tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks) -> None:
    run = _narrow_run(tiny_run, prepared, one_rank, tied=False)
    state = build_state(run, one_rank)
    state.bf16_weights = Bf16Weights(state.model)
    state.loss = PretrainLoss(state.bf16_weights.model, run.train.seq_balance_loss_weight, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    metrics = pretrain_step(
        state, micro_batches(open_rows(prepared, run, "train"), 0, 8, run, one_rank), 8, run, one_rank
    )
    assert not metrics.skipped
    copies = dict(state.bf16_weights.model.named_parameters())
    for name, master in state.model.named_parameters():
        assert not torch.equal(master, before[name]), name
        assert copies[name] is master or torch.equal(copies[name], master.bfloat16()), name
        assert master.grad is None and copies[name].grad is None, name


def _narrow_run(run: Run, prepared: TokenizedCorpus, ranks: Ranks, tied: bool) -> Run:
    model = replace(run.model, tie_word_embeddings=tied)
    return resolve(replace(run, model=model, train=replace(run.train, compute_dtype="bfloat16")), prepared, ranks)


def test_what_is_not_multiplied_narrow_is_shared(tiny_run: Run) -> None:
    model = Model(tiny_run.model)
    copied = Bf16Weights(model).model
    own = {name for name, p in copied.named_parameters() if p is not dict(model.named_parameters())[name]}
    wide = {"embed_tokens.weight"} | {
        n for n, _ in model.named_parameters() if "norm" in n or n.endswith("mlp.gate.weight")
    }
    assert own == {name for name, _ in model.named_parameters()} - wide
    assert all(dict(copied.named_parameters())[name].dtype == torch.bfloat16 for name in own)
    for mine, others in zip(copied.buffers(), model.buffers(), strict=True):
        assert mine is others
