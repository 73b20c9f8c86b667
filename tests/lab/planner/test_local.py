"""The plan of this machine: which steps are timed, what is computed from their times, and refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fathom import presets
from fathom.config import ConfigError
from fathom.data.batch import Batch
from fathom.lab.planner import local
from fathom.lab.planner.local import LocalPlan, Timing, local_json, plan_local
from fathom.model.transformer import Model
from fathom.train.estimate import Estimate
from fathom.train.run import Run
from fathom.train.schedule import batch_sizes
from fathom.train.step import TrainState

CPU = torch.device("cpu")


def _nano(micro_batches: int, length: int = 32, **changes: Any) -> Run:
    run = presets.nano()
    changes = {"micro_batch_size": 2, "sequence_length": length, "compute_dtype": "float32"} | changes
    return replace(run, train=replace(run.train, batch_size=2 * micro_batches, **changes))


def _plan(run: Run, one: float, two: float) -> LocalPlan:
    timings = Timing(1, (one,), 100), Timing(2, (two,), 120)
    return LocalPlan(run, "CPU", Estimate(0, 0, 0, 0), *timings)


def test_larger_steps_add_the_difference_of_the_two_that_were_timed() -> None:
    assert _plan(_nano(1), 0.5, 0.8).seconds_per_step == 0.5
    assert _plan(_nano(2), 0.5, 0.8).seconds_per_step == 0.8
    larger = _plan(_nano(5), 0.5, 0.8)
    assert larger.seconds_per_step == pytest.approx(0.8 + 3 * 0.3)
    assert larger.tokens_per_second == pytest.approx(10 * 32 / 1.7)
    assert [_plan(_nano(n), 0.5, 0.8).extrapolated for n in (1, 2, 3)] == [False, False, True]
    assert _plan(_nano(5), 0.8, 0.7).seconds_per_step == 0.7  # noise never makes a larger step a faster one
    four = replace(larger, several=Timing(4, (1.4,), 120))
    assert [round(four.step_seconds(n), 6) for n in (1, 2, 4, 5)] == [0.5, 0.8, 1.4, 1.7]


def test_peak_memory_is_that_with_gradient_accumulation_if_the_run_accumulates() -> None:
    assert [_plan(_nano(n), 0.5, 0.8).peak_memory for n in (1, 2, 3)] == [100, 120, 120]


def test_the_duration_of_a_run_includes_its_batch_ramp() -> None:
    run = _nano(6, steps=9, batch_ramp_start=2, batch_ramp_steps=5)
    plan = _plan(run, 0.5, 0.8)
    sizes = batch_sizes(run.train)
    assert len(set(sizes)) > 3
    assert plan.run_seconds == pytest.approx(sum(0.2 + 0.3 * (int(size) // 2) for size in sizes))


@pytest.mark.parametrize(
    ("micro_batches", "several", "length", "checkpointing"), [(1, 2, 16, False), (3, 3, 16, False), (7, 4, 48, True)]
)
def test_real_steps_of_two_sizes_are_timed(
    micro_batches: int, several: int, length: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real steps on the run's own model, with a clock that advances by a known cost per step."""
    clock, seen = [0.0], list[list[torch.Size]]()
    real_step = local.pretrain_step

    def step(state: TrainState, batches: list[Batch], sequences: int, *rest: Any) -> Any:
        before = [param.clone() for param in state.model.parameters()]
        metrics = real_step(state, batches, sequences, *rest)
        assert not metrics.skipped and sequences == 2 * len(batches)
        assert any(not torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
        seen.append([batch.inputs.shape for batch in batches])
        clock[0] += 0.25 + 0.5 * len(batches)
        return metrics

    monkeypatch.setattr(local, "pretrain_step", step)
    monkeypatch.setattr(local.time, "perf_counter", lambda: clock[0])
    run = _nano(micro_batches, length, activation_checkpointing=checkpointing)
    plan = plan_local(run, CPU)
    assert seen == 4 * [[(2, length)], several * [(2, length)]]
    assert plan.one.seconds == 3 * (0.75,) and plan.several.seconds == 3 * (0.25 + several * 0.5,)
    seconds = 0.25 + micro_batches * 0.5
    assert local_json(plan)["step"] == {
        "micro_batches": micro_batches,
        "tokens": 2 * micro_batches * length,
        "seconds": seconds,
        "extrapolated": micro_batches > 4,
    }
    assert plan.run_seconds == pytest.approx(run.train.steps * seconds)


def test_a_run_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "free_memory", lambda device: 50 << 20)
    with pytest.raises(
        ConfigError, match=r"gpu is 'cpu', where this run cannot be timed: this run needs about 0\.\d GiB"
    ):
        plan_local(_nano(1), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_error_names_the_flag() -> None:
    with pytest.raises(ConfigError, match="gpu is 'cuda'; it must be cpu here: torch finds no CUDA device"):
        plan_local(_nano(1), torch.device("cuda"))


@pytest.mark.slow
def test_the_command_times_this_machine() -> None:
    """In a separate process, so that its peak memory is its own."""
    words = ["plan", "nano", "--gpu", "cpu", "--global-batch", "12", "--micro-batch", "2", "--length", "64"]
    answer = subprocess.run(
        [sys.executable, "-m", "fathom", *words, "--json"], check=True, stdout=subprocess.PIPE, env=os.environ
    )
    found = json.loads(answer.stdout)
    parameters = sum(p.numel() for p in Model(presets.nano().model).parameters())
    assert 12 * parameters < found["memory"]["peak"] < 4 << 30  # weights, gradients, Muon's momentum; and the program
    assert [len(timing["seconds"]) for timing in found["timed"]] == [3, 3]
    assert found["tokens_per_second"] == pytest.approx(12 * 64 / found["step"]["seconds"])
    text = subprocess.run([sys.executable, "-m", "fathom", *words], check=True, stdout=subprocess.PIPE, env=os.environ)
    for expected in ("Timed here (CPU", "extrapolated", "tokens/s", "600 steps"):
        assert expected in text.stdout.decode()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_timed() -> None:
    plan = plan_local(_nano(3, 64, compute_dtype="bfloat16"), torch.device("cuda"))
    parameters = sum(p.numel() for p in Model(presets.nano().model).parameters())
    assert plan.one.median > 0 and 12 * parameters < plan.one.peak_memory <= plan.several.peak_memory
