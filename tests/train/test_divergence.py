"""A run that diverges ends with a sentence, and leaves a model."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from fathom import load_model
from fathom.checkpoint.training_state import checkpoints
from fathom.cli import main
from fathom.distributed.ranks import Ranks
from fathom.model.transformer import Model
from fathom.train import divergence, pretrain
from fathom.train.divergence import high_loss
from fathom.train.errors import TrainingError
from fathom.train.pretrain import train
from fathom.train.run import Run
from fathom.train.step import TrainState


def test_only_a_loss_that_stays_far_above_its_start_counts(tiny_run: Run) -> None:
    state = TrainState(Model(tiny_run.model), nn.Module(), [], None)
    for start, high, low in ((6.0, 9.1, 8.9), (2.0, 5.1, 4.9), (0.01, 3.1, 2.9), (11.0, 16.6, 16.4)):
        state.first_loss, state.high_in_a_row = None, 0
        assert high_loss(state, start) is None and state.first_loss == start
        for _ in range(99):
            assert high_loss(state, high) is None
        assert high_loss(state, low) is None and state.high_in_a_row == 0
        assert not any(high_loss(state, high) for _ in range(99))
        state.skipped_in_a_row = 1
        assert high_loss(state, float("nan")) is None and state.high_in_a_row == 99
        state.skipped_in_a_row = 0
        assert "far above its start" in str(high_loss(state, high))


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_high_loss_ends_the_run_and_is_not_saved_over_a_good_one(
    tiny_run: Run, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int
) -> None:
    monkeypatch.setattr(divergence, "_HIGH_STEPS", 6)
    run = replace(
        tiny_run,
        train=replace(tiny_run.train, steps=60, save_every=save_every, keep_last=1),
        optimizer=replace(tiny_run.optimizer, learning_rate=1.0),
        schedule=replace(tiny_run.schedule, warmup_steps=0),
    )
    with pytest.raises(TrainingError, match=r"far above its start \(5\.\d+\) for 6 steps.*step-.*Lower") as error:
        train(run, tmp_path, one_rank)
    (left,) = checkpoints(tmp_path)
    assert str(left) in str(error.value) and (tmp_path / "model").resolve() == left
    load_model(left)
    ended = int(str(error.value).partition("up to step ")[2].partition(":")[0])
    step = int(left.name.removeprefix("step-"))
    assert step == ended if save_every == 0 else step <= ended - 6


def test_steps_that_are_not_finite_leave_a_model_and_a_status(
    tiny_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = pretrain.pretrain_step

    def poisoned(state: TrainState, *arguments: object) -> object:
        weight = state.model.norm.weight.data
        kept = weight[0].item()
        weight[0] = float("nan")
        try:
            return real(state, *arguments)  # type: ignore[arg-type]
        finally:
            weight[0] = kept

    monkeypatch.setattr(pretrain, "pretrain_step", poisoned)
    flags = ["--train.save-every", "0", "--train.max-bad-steps", "3"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *tiny_flags, *flags, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "3 steps in a row had a loss or gradient that is not finite" in said
    assert load_model(tmp_path / "run" / "model").norm.weight.isfinite().all()
