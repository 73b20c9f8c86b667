"""One optimizer step: accumulation equals one big batch, bad steps change nothing, the biases move by the rule."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.data.tokenize import TokenizedCorpus
from fathom.distributed.ranks import Ranks
from fathom.model.balance import updated_bias
from fathom.train.errors import TrainingError
from fathom.train.pretrain import micro_batches, pretrain_step, train
from fathom.train.run import Run
from fathom.train.schedule import StepHyperparameters
from fathom.train.setup import build_state, open_rows, resolve, tokenize_once
from fathom.train.step import LossOutput, TrainState, optimizer_step


@pytest.fixture
def prepared(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> TokenizedCorpus:
    return tokenize_once(tiny_run, tmp_path / "data", one_rank)


def _after_two_steps(run: Run, prepared: TokenizedCorpus, ranks: Ranks) -> TrainState:
    run = resolve(run, prepared, ranks)
    state = build_state(run, ranks)
    rows = open_rows(prepared, run, "train")
    for step in range(2):
        batches = micro_batches(rows, step * run.train.batch_size, run.train.batch_size, run, ranks)
        pretrain_step(state, batches, run.train.batch_size, run, ranks)
    return state


def test_four_micro_batches_equal_one_batch(tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks) -> None:
    """Rows differ in how many MTP targets cross a document, so a mean of means would differ."""
    adamw = replace(tiny_run, optimizer=replace(tiny_run.optimizer, name="adamw"))
    whole = _after_two_steps(replace(adamw, train=replace(adamw.train, micro_batch_size=8)), prepared, one_rank)
    parts = _after_two_steps(replace(adamw, train=replace(adamw.train, micro_batch_size=2)), prepared, one_rank)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), parts.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)
    for a, b in zip(whole.model.routers(), parts.model.routers(), strict=True):
        assert torch.equal(a.e_score_correction_bias, b.e_score_correction_bias)


def test_recomputing_the_layers_changes_nothing(tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks) -> None:
    again = replace(tiny_run, train=replace(tiny_run.train, activation_checkpointing=True))
    kept, remade = (_after_two_steps(run, prepared, one_rank) for run in (tiny_run, again))
    for (name, a), (_, b) in zip(kept.model.named_parameters(), remade.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_biases_follow_the_rule_from_the_steps_own_loads(
    tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks
) -> None:
    run = resolve(tiny_run, prepared, one_rank)
    state = build_state(run, one_rank)
    batches = micro_batches(open_rows(prepared, run, "train"), 0, 8, run, one_rank)
    metrics = pretrain_step(state, batches, 8, run, one_rank)
    tokens = 8 * run.train.sequence_length
    assert metrics.tokens_per_expert_LE.sum(-1).tolist() == [tokens * run.model.num_experts_per_tok] * 3
    for router, tokens_per_expert_E in zip(state.model.routers(), metrics.tokens_per_expert_LE, strict=True):
        expected = updated_bias(
            torch.zeros_like(router.e_score_correction_bias), tokens_per_expert_E, run.schedule.bias_update_speed
        )
        assert torch.equal(router.e_score_correction_bias, expected)
        assert expected.abs().max() > 0


def test_a_step_with_an_infinite_loss_changes_nothing(
    tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks
) -> None:
    run = resolve(tiny_run, prepared, one_rank)
    state = build_state(run, one_rank)
    with torch.no_grad():
        state.model.layers[1].mlp.experts.down_proj[0, 0, 0] = float("inf")
    before = {name: t.clone() for name, t in state.model.state_dict().items()}
    batches = micro_batches(open_rows(prepared, run, "train"), 0, 8, run, one_rank)
    metrics = pretrain_step(state, batches, 8, run, one_rank)
    assert metrics.skipped
    assert (state.step, state.skipped, state.skipped_in_a_row) == (1, 1, 1)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    moments = [each for optimizer in state.optimizers for own in optimizer.state.values() for each in own.values()]
    assert moments and not any(each.any() for each in moments)


def test_any_loss_and_any_batch_accumulate_and_are_clipped(
    tiny_run: Run, prepared: TokenizedCorpus, one_rank: Ranks
) -> None:
    """With a loss that is linear in one weight and plain SGD, the step is known in closed form."""
    run = resolve(tiny_run, prepared, one_rank)
    state = build_state(run, one_rank)
    weight = state.model.lm_head.weight
    state.optimizers = [torch.optim.SGD(state.model.parameters(), lr=0.0)]
    before, draw = weight.detach().clone(), torch.Generator().manual_seed(0)
    slopes = [torch.randn(weight.shape, generator=draw) for _ in range(3)]
    routers, experts = len(list(state.model.routers())), run.model.n_routed_experts

    def loss(slope: torch.Tensor) -> LossOutput:
        total = (slope * weight).sum()
        tokens_per_expert_LE = torch.zeros(routers, experts, dtype=torch.int64)
        return LossOutput(total, total.detach()[None], torch.zeros(()), tokens_per_expert_LE)

    gradient = sum(slopes, start=torch.zeros(()))
    norm = float(gradient.norm())
    hyper = StepHyperparameters(learning_rate=0.5, max_grad_norm=norm / 4, bias_update_speed=1.0, mtp_loss_weight=0.0)
    metrics = optimizer_step(state, slopes, loss, torch.tensor([2.0]), hyper, one_rank)
    assert metrics.loss == pytest.approx(float((gradient * before).sum()) / 2, rel=1e-4)
    assert metrics.mtp_loss is None
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(weight.detach(), before - 0.5 * gradient / 4, rtol=1e-4, atol=1e-5)
    assert all(not router.e_score_correction_bias.any() for router in state.model.routers())  # no loads, no change


@pytest.mark.slow
def test_a_diverged_run_stops_and_leaves_the_good_checkpoint(tiny_run: Run, one_rank: Ranks, tmp_path: Path) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, steps=4, save_every=2, max_bad_steps=3))
    out = tmp_path / "run"
    assert train(run, out, one_rank)
    run = replace(run, train=replace(run.train, steps=40), optimizer=replace(run.optimizer, learning_rate=1e30))
    recorded = (out / "run.json").read_text()
    (out / "run.json").write_text(recorded.replace('"learning_rate": 0.003', '"learning_rate": 1e30'))
    saved = (out / "checkpoints" / "step-000004" / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=r"in a row had a loss or gradient that is not finite.*learning-rate"):
        train(run, out, one_rank, resume=True)
    newest = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert "step-000004" in newest
    assert (out / "checkpoints" / "step-000004" / "model.safetensors").read_bytes() == saved
