"""Whole runs with adapters: the same weights after an interruption, and an engine that samples from merged ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("jinja2", reason="templates need jinja2")

from fathom.checkpoint.hf.model import load_model
from fathom.cli import main
from fathom.config import load_json
from fathom.distributed.ranks import Ranks
from fathom.metrics import read_metrics
from fathom.posttrain import rl as rl_module
from fathom.posttrain.config import LoopConfig, LoraConfig
from fathom.posttrain.rl import rl
from fathom.posttrain.rl_config import RlConfig, RlRun
from fathom.posttrain.sft import sft
from fathom.posttrain.sft_config import SftData, SftLoopConfig, SftRun
from fathom.posttrain.tasks.protocol import Problem, Task
from fathom.train.run import OptimizerConfig
from tests.posttrain.chats import write_chats
from tests.posttrain.models import save_tiny
from tests.posttrain.runs import assert_resumes_exactly

ADAMW = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)


def _sft_run(tmp_path: Path, **changes: Any) -> SftRun:
    train = SftLoopConfig(
        steps=4, batch_samples=8, max_length=128, micro_batch_tokens=256, compute_dtype="float32", save_every=2
    )
    data = SftData(str(write_chats(tmp_path / "chats.jsonl")))
    model = str(save_tiny(tmp_path / "model", max_position_embeddings=256))
    return replace(SftRun(model, train=train, optimizer=ADAMW, data=data, lora=LoraConfig(4, experts=True)), **changes)


@pytest.mark.slow
def test_fine_tuning_resumes_exactly_and_learns(tmp_path: Path, one_rank: Ranks) -> None:
    run = _sft_run(tmp_path)
    assert_resumes_exactly(sft, run, tmp_path / "out", one_rank, lost="step-000004")
    losses = [record["loss"] for record in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_biases_that_move_are_kept(tmp_path: Path, one_rank: Ranks) -> None:
    """The correction biases are no adapters, and the base has the old ones."""
    run = _sft_run(tmp_path)
    run = replace(run, train=replace(run.train, bias_update_speed=0.1))
    assert_resumes_exactly(sft, run, tmp_path / "out", one_rank, lost="step-000004")
    start, end = load_model(tmp_path / "model"), load_model(tmp_path / "out" / "model")
    moved = [
        a.e_score_correction_bias - b.e_score_correction_bias
        for a, b in zip(start.routers(), end.routers(), strict=True)
    ]
    assert all(0.1 <= float(difference_E.abs().max()) <= 0.41 for difference_E in moved)


class Letters(Task):
    """The more letters, the better: what a random model writes differs in that."""

    name = "letters"

    def problem(self, i: int) -> Problem:
        return Problem(i, ({"role": "user", "content": f"The number is {i % 97}"},), None, ())

    def reward(self, problem: Problem, text: str) -> float:
        return sum(map(str.isalpha, text)) / max(8, len(text))


@pytest.mark.slow
def test_reinforcement_learning_samples_from_what_it_trains(
    tmp_path: Path, one_rank: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl_module, "task", lambda name: Letters())
    model = save_tiny(tmp_path / "model", std=0.15)
    config = RlConfig(
        "letters", problems=2, group_size=4, max_tokens=8, eval_problems=0, overlong="penalise", overlong_cushion=8
    )
    train = LoopConfig(steps=4, max_length=128, compute_dtype="float32", save_every=2, eval_every=0)
    run = RlRun(str(model), rl=config, train=train, optimizer=ADAMW, lora=LoraConfig(4, experts=True))
    assert_resumes_exactly(rl, run, tmp_path / "out", one_rank, lost="step-000004")
    records = read_metrics(tmp_path / "out" / "metrics.jsonl")
    trained = [record for record in records if "max_abs_dlogp" in record]
    assert len(trained) >= 2
    assert all(record["max_abs_dlogp"] < 1e-4 and record["route_mismatch"] == 0 for record in trained)
    start, end = load_model(model), load_model(tmp_path / "out" / "model")
    assert not torch.equal(start.layers[1].mlp.experts.down_proj, end.layers[1].mlp.experts.down_proj)


@pytest.mark.slow
def test_flags_are_recorded_and_left_as_they_are(tmp_path: Path) -> None:
    run, out = _sft_run(tmp_path), tmp_path / "out"
    words = ["--data", run.data.chats, "--train.max-length", "128", "--train.batch-samples", "8", "--train.steps", "1"]
    main(["sft", run.init, *words, "--lora.rank", "2", "--lora.alpha", "4", "--out", str(out)])
    main(["sft", "--resume", "--out", str(out), "--train.steps", "2"])
    assert load_json(SftRun, out / "run.json").lora == LoraConfig(2, alpha=4)


def test_a_rank_beyond_a_matrix_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = _sft_run(tmp_path), tmp_path / "out"
    words = ["--data", run.data.chats, "--train.max-length", "128", "--train.batch-samples", "8"]
    with pytest.raises(SystemExit):
        main(["sft", run.init, *words, "--lora.rank", "64", "--out", str(out)])
    assert "lora.rank is 64; it must be from 1 to" in capsys.readouterr().err
    assert not (out / "run.json").exists()
