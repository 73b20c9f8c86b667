"""The plan of a GPU: its parts grow with what they stand for; where there is a GPU, its rates are measured."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fathom import presets
from fathom.config import ConfigError
from fathom.lab.planner.local.gpu_rates import GpuMachine
from fathom.lab.planner.local.gpu_step import gpu_step_time, pass_bytes
from fathom.lab.planner.local.report import plan_here, shape_of
from fathom.lab.planner.local.step import StepTime
from fathom.train.run import Run


class EvenMachine:
    """A second for 1e14 FLOPs of any product, and for 1e12 bytes; a host that takes its time."""

    bandwidth = 1e12

    def __init__(self, host: float = 0.0) -> None:
        self._host = host

    def product(self, rows: int, inner: int, columns: int, transposed: bool = False) -> float:
        return 2 * rows * inner * columns / 1e14

    def experts(self, experts: int, rows: int, hidden: int, width: int) -> float:
        return 18 * rows * hidden * width / 1e14

    def attention(self, batch: int, length: int, heads: int, key: int, value: int) -> float:
        return 3 * batch * heads * length * length * (key + value) / 1e14

    def router(self, tokens: int, hidden: int, experts: int) -> float:
        return 6 * tokens * hidden * experts / 1e14

    head = router

    def sort(self, *_: int) -> float:
        return 0.0

    def orthogonalized(self, count: int, short: int, long: int) -> float:
        return count * short * short * long / 1e14

    def host(self, kind: str) -> tuple[float, float]:
        return self._host, self._host


def _time(run: Run, host: float = 0.0) -> StepTime:
    return gpu_step_time(run, shape_of(run), cast(GpuMachine, EvenMachine(host)))


def _run(**changes: Any) -> Run:
    run = presets.moe_16b_a3b()
    train = replace(
        run.train, batch_size=8, micro_batch_size=2, sequence_length=1024, compute_dtype="bfloat16", **changes
    )
    return replace(run, train=train, optimizer=replace(run.optimizer, name="adamw"))


def test_products_are_the_models_flops() -> None:
    run = _run()
    time = _time(run)
    flops = 8 * 1024 * run.model.flops_per_token(1024, mtp=True)
    assert 1e14 * (time.projections + time.experts + time.attention + time.head) == pytest.approx(flops, rel=0.01)


def test_recomputing_and_muon_take_longer() -> None:
    run = _run()
    assert _time(_run(activation_checkpointing=True)).projections > 1.3 * _time(run).projections
    muon = replace(run, optimizer=replace(run.optimizer, name="muon"))
    assert _time(muon).optimizer > _time(run).optimizer
    longer = replace(run.model, num_hidden_layers=run.model.num_hidden_layers + 1)
    assert pass_bytes(longer, 2) > pass_bytes(run.model, 2)


def test_the_host_counts_where_it_is_the_slower_one() -> None:
    run = _run()
    alone = _time(run)
    assert alone.overhead == 0 and _time(run, 1e-6).total == alone.total
    slow = _time(run, 1.0)
    assert slow.total == pytest.approx(4 * (run.model.num_hidden_layers + run.model.num_nextn_predict_layers) + 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        plan_here(_run(), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpus_rates() -> None:
    plan = plan_here(
        replace(presets.nano(), train=replace(presets.nano().train, compute_dtype="bfloat16")), torch.device("cuda")
    )
    assert all(seconds > 0 for name, seconds in vars(plan.time).items() if name != "overhead")
    assert plan.machine.others()["bandwidth"] > 1e11 and plan.machine.products
